"""Registered metrics, and the sweep of disturbances around a model."""

from mmstabvim.evaluation.robustness_metric import RobustnessMetric
from mmstabvim.evaluation.robustness_wrapper import RobustnessWrapper
from mmstabvim.evaluation.sensitivity_metric import SensitivityMetric
from mmstabvim.registry import METRICS, register_of_mmseg

_OF_MMSEG = {
    'ClassIoUMetric': ('mmstabvim.evaluation.class_iou_metric', METRICS),
}

__all__ = [
    'RobustnessMetric',
    'RobustnessWrapper',
    'SensitivityMetric',
    *sorted(_OF_MMSEG),
]

__getattr__ = register_of_mmseg(__name__, _OF_MMSEG)
