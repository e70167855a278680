"""Registered metrics, and the sweep of corruptions around a model."""

from mmstabvim.evaluation.robustness_metric import RobustnessMetric
from mmstabvim.evaluation.robustness_wrapper import RobustnessWrapper
from mmstabvim.evaluation.sensitivity_metric import SensitivityMetric
from mmstabvim.registry import METRICS, defer_to_mmseg

__all__ = [
    'ClassIoUMetric',
    'RobustnessMetric',
    'RobustnessWrapper',
    'SensitivityMetric',
]

__getattr__ = defer_to_mmseg(
    __name__,
    {METRICS: {'ClassIoUMetric': 'mmstabvim.evaluation.class_iou_metric'}},
)
