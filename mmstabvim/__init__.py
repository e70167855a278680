"""Stabilized Vision Mamba for OpenMMLab.

Importing the package installs the compatibility shims of
:mod:`mmstabvim.compat` where MMEngine can be used, and nothing heavy: every
public name is loaded on first use. With PyTorch alone ``mmstabvim.ops``,
``.layers`` and ``.stability`` can be used.
"""

import sys
from functools import partial
from importlib import import_module
from typing import Any

from mmstabvim import stack
from mmstabvim.version import __version__

_PUBLIC = {
    'CamVidDataset': 'mmstabvim.datasets',
    'CheckSegMap': 'mmstabvim.datasets',
    'ClassIoUMetric': 'mmstabvim.evaluation',
    'ClassificationDataCheckHook': 'mmstabvim.engine.hooks',
    'DigitScenes': 'mmstabvim.datasets',
    'Digits': 'mmstabvim.datasets',
    'DivergenceHook': 'mmstabvim.engine.hooks',
    'EarlierLayoutHook': 'mmstabvim.engine.hooks',
    'EigenvalueClampingHook': 'mmstabvim.engine.hooks',
    'EntropyLoss': 'mmstabvim.models',
    'JacobianLoss': 'mmstabvim.models',
    'LayerDecayOptimWrapperConstructor': 'mmstabvim.engine.optimizers',
    'ModelForMetricsHook': 'mmstabvim.engine.hooks',
    'RandomStateHook': 'mmstabvim.engine.hooks',
    'RobustnessMetric': 'mmstabvim.evaluation',
    'RobustnessWrapper': 'mmstabvim.evaluation',
    'SegOverlayVisualizer': 'mmstabvim.visualization.seg_overlay',
    'SegmentationDataCheckHook': 'mmstabvim.engine.hooks',
    'SensitivityMetric': 'mmstabvim.evaluation',
    'SimpleFeaturePyramid': 'mmstabvim.models',
    'SpectralConstraintLoss': 'mmstabvim.models',
    'SpectralNormalizationHook': 'mmstabvim.engine.hooks',
    'StabilityError': 'mmstabvim.layers',
    'StabilityLoss': 'mmstabvim.models',
    'StabilityLossHook': 'mmstabvim.engine.hooks',
    'StabilityMonitorHook': 'mmstabvim.engine.hooks',
    'StableRankHook': 'mmstabvim.engine.hooks',
    'VisionMamba': 'mmstabvim.models',
    'WeightSpectralNormHook': 'mmstabvim.engine.hooks',
    'load_weights': 'mmstabvim.loading',
    'verify': 'mmstabvim.layers',
}

_NEED_MMENGINE = (
    'mmstabvim.ablation',
    'mmstabvim.analysis',
    'mmstabvim.apis',
    'mmstabvim.building',
    'mmstabvim.compat',
    'mmstabvim.datasets',
    'mmstabvim.engine',
    'mmstabvim.evaluation',
    'mmstabvim.loading',
    'mmstabvim.model_hub',
    'mmstabvim.models',
    'mmstabvim.registry',
)

__all__ = ['__version__', *sorted(_PUBLIC)]

if 'mmengine' in sys.modules or stack.find_problem('mmengine') is None:
    import_module('mmstabvim.compat').install()
else:
    for _name in ('mmengine', *_NEED_MMENGINE):
        stack.before_import(_name, partial(stack.check, 'mmengine'))


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted({*globals(), *__all__})
