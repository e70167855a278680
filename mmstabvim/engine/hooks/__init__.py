"""Registered hooks."""

from mmstabvim.engine.hooks.divergence_hook import DivergenceHook
from mmstabvim.engine.hooks.eigenvalue_clamping_hook import (
    EigenvalueClampingHook,
)
from mmstabvim.engine.hooks.random_state_hook import RandomStateHook
from mmstabvim.engine.hooks.spectral_normalization_hook import (
    SpectralNormalizationHook,
)
from mmstabvim.engine.hooks.stability_loss_hook import StabilityLossHook
from mmstabvim.engine.hooks.stability_monitor_hook import StabilityMonitorHook

__all__ = [
    'DivergenceHook',
    'EigenvalueClampingHook',
    'RandomStateHook',
    'SpectralNormalizationHook',
    'StabilityLossHook',
    'StabilityMonitorHook',
]
