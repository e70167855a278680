"""Registered hooks and what the command-line tools share."""

from mmstabvim.engine.hooks import (
    DivergenceHook,
    EigenvalueClampingHook,
    RandomStateHook,
    SpectralNormalizationHook,
    StabilityLossHook,
    StabilityMonitorHook,
)

__all__ = [
    'DivergenceHook',
    'EigenvalueClampingHook',
    'RandomStateHook',
    'SpectralNormalizationHook',
    'StabilityLossHook',
    'StabilityMonitorHook',
]
