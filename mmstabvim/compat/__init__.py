"""Shims that the OpenMMLab stack needs, each with its end.

``import mmstabvim`` calls :func:`install`. Each shim does nothing where it
is not needed, and can go when its note says so. Checkpoints are read by
:mod:`mmstabvim.checkpoint`; here it is put into mmengine's loading paths.
"""

import sys
from functools import partial

from mmengine.config import utils as config_utils
from mmengine.hub import hub as hub_module
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmstabvim import loading, model_hub, stack
from mmstabvim.compat.checkpoints import SafeTorch, load_checkpoints_safely
from mmstabvim.compat.config_package import add_config_package
from mmstabvim.compat.cpu_amp import CPUAmpOptimWrapper, register_cpu_amp
from mmstabvim.compat.cpu_distributed import prepare_cpu_distributed
from mmstabvim.compat.mmcv_ext import stub_mmcv_ext
from mmstabvim.compat.unreadable_files import name_unreadable_files

__all__ = [
    'CPUAmpOptimWrapper',
    'add_config_package',
    'install',
    'load_checkpoints_safely',
    'name_unreadable_files',
    'prepare_cpu_distributed',
    'register_cpu_amp',
    'status',
    'stub_mmcv_ext',
]


def install() -> None:
    """Install every shim that acts by itself; more than once does no harm.

    Raises:
        ImportError: If both forms of OpenMMLab are installed.
    """
    stack.check('mmengine')
    stub_mmcv_ext()
    load_checkpoints_safely()
    loading.install()
    register_cpu_amp()
    add_config_package()
    model_hub.serve_hub()
    stack.after_import('mmpretrain.apis.model', model_hub.register_models)
    stack.after_import('mmcv.transforms.base', name_unreadable_files)
    for package in ('mmpretrain', 'mmseg'):
        stack.before_import(package, partial(stack.check, package))


def status() -> dict[str, str]:
    """List the shims and their state, for a report.

    Returns:
        dict[str, str]: State by name of the shim.
    """
    stub = sys.modules.get('mmcv._ext')
    waits = 'waits for the import of mmcv'
    base = sys.modules.get('mmcv.transforms.base')
    amp = OPTIM_WRAPPERS.get('AmpOptimWrapper') is CPUAmpOptimWrapper
    reads = mmengine_checkpoint.CheckpointLoader.load_checkpoint
    wrapped = {
        'weights: one door': reads,
        'models in the hub': hub_module.get_model,
    }
    if base is not None:
        wrapped['names of unreadable files'] = base.BaseTransform.__call__
    return {
        'stub of mmcv._ext': 'active'
        if getattr(stub, '__loader__', None) is None and stub is not None
        else 'not needed',
        'checkpoints: tensors only': _active(
            isinstance(mmengine_checkpoint.torch, SafeTorch)
        ),
        'bfloat16 AMP on a CPU': 'active' if amp else 'not needed',
        'configs mmstabvim::...': _active(
            'mmstabvim' in config_utils.MODULE2PACKAGE
        ),
        **{k: _active(hasattr(v, '__wrapped__')) for k, v in wrapped.items()},
        **({} if base else {'names of unreadable files': waits}),
    }


def _active(is_active: bool) -> str:
    """Word the state of a shim that is always needed."""
    return 'active' if is_active else 'FAILED: not active'
