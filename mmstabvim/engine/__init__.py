"""Registered hooks and what the command-line tools share."""

from mmstabvim.engine.hooks import (
    ClassificationDataCheckHook,
    DivergenceHook,
    EarlierLayoutHook,
    EigenvalueClampingHook,
    ModelForMetricsHook,
    RandomStateHook,
    SegmentationDataCheckHook,
    SpectralNormalizationHook,
    StabilityLossHook,
    StabilityMonitorHook,
    StableRankHook,
    WeightSpectralNormHook,
)
from mmstabvim.engine.optimizers import LayerDecayOptimWrapperConstructor

__all__ = [
    'ClassificationDataCheckHook',
    'DivergenceHook',
    'EarlierLayoutHook',
    'EigenvalueClampingHook',
    'LayerDecayOptimWrapperConstructor',
    'ModelForMetricsHook',
    'RandomStateHook',
    'SegmentationDataCheckHook',
    'SpectralNormalizationHook',
    'StabilityLossHook',
    'StabilityMonitorHook',
    'StableRankHook',
    'WeightSpectralNormHook',
]
