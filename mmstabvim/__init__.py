"""Stabilized Vision Mamba for OpenMMLab.

Importing the package installs the compatibility shims of
:mod:`mmstabvim.compat` and nothing heavy: every public name is loaded on
first use.
"""

from importlib import import_module
from typing import Any

from mmstabvim import compat
from mmstabvim.version import __version__

_PUBLIC = {
    'CamVidDataset': 'mmstabvim.datasets',
    'CheckSegMap': 'mmstabvim.datasets',
    'ClassIoUMetric': 'mmstabvim.evaluation',
    'DigitScenes': 'mmstabvim.datasets',
    'Digits': 'mmstabvim.datasets',
    'DivergenceHook': 'mmstabvim.engine',
    'EigenvalueClampingHook': 'mmstabvim.engine',
    'EntropyLoss': 'mmstabvim.models',
    'JacobianLoss': 'mmstabvim.models',
    'LayerDecayOptimWrapperConstructor': 'mmstabvim.engine',
    'ModelForMetricsHook': 'mmstabvim.engine',
    'RandomStateHook': 'mmstabvim.engine',
    'RobustnessMetric': 'mmstabvim.evaluation',
    'RobustnessWrapper': 'mmstabvim.evaluation',
    'SegmentationDataCheckHook': 'mmstabvim.engine',
    'SensitivityMetric': 'mmstabvim.evaluation',
    'SimpleFeaturePyramid': 'mmstabvim.models',
    'SpectralConstraintLoss': 'mmstabvim.models',
    'SpectralNormalizationHook': 'mmstabvim.engine',
    'StabilityLoss': 'mmstabvim.models',
    'StabilityLossHook': 'mmstabvim.engine',
    'StabilityMonitorHook': 'mmstabvim.engine',
    'StableRankHook': 'mmstabvim.engine',
    'VisionMamba': 'mmstabvim.models',
    'WeightSpectralNormHook': 'mmstabvim.engine',
    'load_weights': 'mmstabvim.loading',
}

__all__ = ['__version__', *sorted(_PUBLIC)]

compat.install()


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted({*globals(), *__all__})
