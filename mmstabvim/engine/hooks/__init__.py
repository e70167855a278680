"""Registered hooks."""

from mmstabvim.engine.hooks.classification_data_check_hook import (
    ClassificationDataCheckHook,
)
from mmstabvim.engine.hooks.divergence_hook import DivergenceHook
from mmstabvim.engine.hooks.earlier_layout_hook import EarlierLayoutHook
from mmstabvim.engine.hooks.eigenvalue_clamping_hook import (
    EigenvalueClampingHook,
)
from mmstabvim.engine.hooks.model_for_metrics_hook import ModelForMetricsHook
from mmstabvim.engine.hooks.random_state_hook import RandomStateHook
from mmstabvim.engine.hooks.segmentation_data_check_hook import (
    SegmentationDataCheckHook,
)
from mmstabvim.engine.hooks.spectral_normalization_hook import (
    SpectralNormalizationHook,
)
from mmstabvim.engine.hooks.stability_loss_hook import StabilityLossHook
from mmstabvim.engine.hooks.stability_monitor_hook import StabilityMonitorHook
from mmstabvim.engine.hooks.stable_rank_hook import StableRankHook
from mmstabvim.engine.hooks.weight_spectral_norm_hook import (
    WeightSpectralNormHook,
)

__all__ = [
    'ClassificationDataCheckHook',
    'DivergenceHook',
    'EarlierLayoutHook',
    'EigenvalueClampingHook',
    'ModelForMetricsHook',
    'RandomStateHook',
    'SegmentationDataCheckHook',
    'SpectralNormalizationHook',
    'StabilityLossHook',
    'StabilityMonitorHook',
    'StableRankHook',
    'WeightSpectralNormHook',
]
