"""Shims that today's OpenMMLab stack needs, each with its end.

``import mmstabvim`` calls :func:`install`. Each shim does nothing where it
is not needed, and can go when its note says so. Checkpoints are read by
:mod:`mmstabvim.checkpoint`; here it is put into mmengine's loading paths.
"""

import atexit
import functools
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn
from urllib.parse import urlparse

import torch
from mmengine.config import config as config_module
from mmengine.config import utils as config_utils
from mmengine.device import get_device
from mmengine.hub import hub as hub_module
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import FlexibleRunner, Runner
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmstabvim import loading, model_hub, stack
from mmstabvim.checkpoint import (
    load_checkpoint_tensors,
    load_everything,
    load_tensors,
)

__all__ = [
    'DEFAULT_HOOKS',
    'CPUAmpOptimWrapper',
    'add_config_package',
    'install',
    'load_checkpoint_tensors',
    'load_checkpoints_safely',
    'name_unreadable_files',
    'prepare_cpu_distributed',
    'register_cpu_amp',
    'remove_hooks_by_none',
    'status',
    'stub_mmcv_ext',
]

DEFAULT_HOOKS = frozenset(
    {
        'runtime_info',
        'timer',
        'sampler_seed',
        'logger',
        'param_scheduler',
        'checkpoint',
    }
)
"""Names under ``default_hooks`` that mmengine fills in by itself."""


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
    remove_hooks_by_none()
    model_hub.serve_hub()
    stack.after_import('mmpretrain.apis.model', model_hub.register_models)
    stack.after_import('mmcv.transforms.base', name_unreadable_files)
    for package in ('mmpretrain', 'mmseg'):
        stack.before_import(package, partial(stack.check, package))


def status() -> dict[str, str]:
    """Tell which shims are active, for a report.

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
        'default_hooks.NAME=None': Runner.register_default_hooks,
    }
    if base is not None:
        wrapped['names of unreadable files'] = base.BaseTransform.__call__
    return {
        'stub of mmcv._ext': 'active'
        if getattr(stub, '__loader__', None) is None and stub is not None
        else 'not needed',
        'checkpoints: tensors only': _active(
            isinstance(mmengine_checkpoint.torch, _SafeTorch)
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


# --- mmcv-lite --------------------------------------------------------------


def stub_mmcv_ext() -> None:
    """Let ``mmcv.ops`` be imported where mmcv has no compiled part.

    ``mmseg.models`` imports it. Needed with mmcv-lite 2.1.0 and mmseg 1.2.2;
    ends when mmseg imports without ``mmcv.ops``. Full mmcv is not touched.
    """
    mmcv = importlib.util.find_spec('mmcv')
    if 'mmcv._ext' in sys.modules or mmcv is None:
        return
    folders = mmcv.submodule_search_locations
    if PathFinder.find_spec('mmcv._ext', folders) is None:
        sys.modules['mmcv._ext'] = _make_stub()


def _make_stub() -> ModuleType:
    """Make a module in which every name is a function that raises."""
    stub = ModuleType('mmcv._ext', 'Stands for the compiled part of mmcv.')
    # Without a loader mmcv's own check says that there are no ops.
    stub.__spec__ = ModuleSpec('mmcv._ext', None)
    stub.__getattr__ = _missing_op  # type: ignore[method-assign]
    # No ops, but asked for when mmcv lists its environment.
    for name in ('get_compiler_version', 'get_compiling_cuda_version'):
        setattr(stub, name, lambda: 'n/a')
    return stub


def _missing_op(name: str) -> Callable:
    """Return a function that raises for the op ``name``."""
    if name.startswith('__'):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def missing_op(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f'the mmcv op {name!r} is compiled, and the mmcv that is '
            f'installed has no compiled part. Cure: {stack.ops_command()}'
        )

    return missing_op


# --- checkpoints ------------------------------------------------------------

_full_load: ContextVar[bool] = ContextVar('full_load', default=False)
"""True between the start of a resume and the load of its file."""


def load_checkpoints_safely() -> None:
    """Make mmengine load tensors only, except to resume one's own run.

    mmengine 0.10.7 calls ``torch.load`` with PyTorch's default (up to 2.5 it
    runs code, from 2.6 it fails on mmengine's own files), 0.11.0rc3 always
    with ``weights_only=False``, both ``load_url`` likewise. Ends when
    mmengine loads ``load_from`` and ``init_cfg`` with ``weights_only=True``.
    """
    if isinstance(mmengine_checkpoint.torch, _SafeTorch):
        return
    mmengine_checkpoint.torch = _SafeTorch()
    mmengine_checkpoint.load_url = _load_url
    for cls in (Runner, FlexibleRunner):
        cls.resume = _with_full_load(cls.resume)


class _SafeTorch:
    """What mmengine's checkpoint module sees as ``torch``."""

    def __getattr__(self, name: str) -> Any:
        """Pass on everything except ``load``."""
        return getattr(torch, name)

    @staticmethod
    def load(
        f: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> Any:
        """Load tensors only; in a resume, everything.

        ``weights_only`` is ignored: mmengine 0.11 sets it to False whatever
        the file's origin.
        """
        if not _full_load.get():
            return load_tensors(f, map_location)
        # Only the resumed file itself is trusted, not one that a hook loads.
        _full_load.set(False)
        print_log(
            'Resume: the checkpoint is loaded in full (weights_only=False), '
            'which can run code in it. Resume only runs of your own.',
            logger='current',
        )
        return load_everything(f, map_location)


def _load_url(
    url: str,
    model_dir: str | None = None,
    map_location: Any = None,
    progress: bool = True,
) -> Any:
    """Download into PyTorch's hub folder, unless there, and load tensors."""
    if _full_load.get():
        raise ValueError(
            f'resume wants a local checkpoint of your own run, got {url}: '
            'download it first, or use `load_from` for its weights'
        )
    folder = model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, os.path.basename(urlparse(url).path))
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=progress)
    return load_tensors(path, map_location)


def _with_full_load(resume: Callable) -> Callable:
    """Wrap a runner's ``resume`` so that its file is loaded in full."""

    @functools.wraps(resume)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        token = _full_load.set(True)
        try:
            return resume(*args, **kwargs)
        finally:
            _full_load.reset(token)

    return wrapped


# --- automatic mixed precision on a CPU -------------------------------------


class CPUAmpOptimWrapper(OptimWrapper):
    """``AmpOptimWrapper`` for the CPU: the forward runs in bfloat16 autocast.

    Args:
        loss_scale (str | float | dict): Accepted as by ``AmpOptimWrapper``
            and without effect: bfloat16 has the range of float32, so nothing
            is scaled. Defaults to 'dynamic'.
        dtype (str | torch.dtype, optional): ``'bfloat16'`` or None, which
            means the same. Defaults to None.
        **kwargs: For ``OptimWrapper``.

    Raises:
        ValueError: If ``dtype`` is another one.
    """

    def __init__(
        self,
        loss_scale: str | float | dict = 'dynamic',
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if dtype not in (None, 'bfloat16', torch.bfloat16):
            raise ValueError(
                "dtype: on a CPU AmpOptimWrapper wants 'bfloat16' or None, "
                f'got {dtype!r}'
            )
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Enter bfloat16 autocast beside the base class's context."""
        autocast = torch.autocast('cpu', torch.bfloat16)
        with super().optim_context(model), autocast:
            yield


def register_cpu_amp() -> None:
    """Make ``type='AmpOptimWrapper'`` work where there is no accelerator.

    mmengine 0.10.7 and 0.11.0rc3 assert a GPU. Ends when mmengine's own
    ``AmpOptimWrapper`` runs on a CPU.
    """
    if get_device() == 'cpu':
        OPTIM_WRAPPERS.register_module(
            name='AmpOptimWrapper', module=CPUAmpOptimWrapper, force=True
        )


# --- unreadable files --------------------------------------------------------


def name_unreadable_files(base: ModuleType) -> None:
    """Let an error of a loading transform name the file.

    OpenCV and Pillow do not, mmcv passes their errors on. Ends when mmcv's
    ``LoadImageFromFile`` and ``LoadAnnotations`` name the file themselves.

    Args:
        base (ModuleType): ``mmcv.transforms.base``.
    """
    call = base.BaseTransform.__call__
    if not hasattr(call, '__wrapped__'):
        base.BaseTransform.__call__ = _with_file_name(call)


def _with_file_name(call: Callable) -> Callable:
    """Wrap a transform's ``__call__``."""

    @functools.wraps(call)
    def wrapped(self: Any, results: Any) -> Any:
        try:
            return call(self, results)
        except Exception as error:
            name = type(self).__name__
            if not name.startswith('Load') or not isinstance(results, dict):
                raise
            masks = 'Annotation' in name and results.get('seg_map_path')
            path = masks or results.get('img_path')
            if not path or str(path) in str(error):
                raise
            raise ValueError(
                f'{path} cannot be read by {name}, it may be damaged or '
                f'incomplete ({type(error).__name__}: {error})'
            ) from error

    return wrapped


# --- hooks that are taken out -----------------------------------------------


def remove_hooks_by_none() -> None:
    """Let None under ``default_hooks`` remove a hook of any name.

    mmengine takes None for its own six and fails with an empty assertion
    for others. Ends when it takes None for every name.
    """
    for runner in (Runner, FlexibleRunner):
        register = runner.register_default_hooks
        if not hasattr(register, '__wrapped__'):
            runner.register_default_hooks = _without_removed(register)


def _without_removed(register: Callable) -> Callable:
    """Wrap a runner's ``register_default_hooks``."""

    @functools.wraps(register)
    def wrapped(self: Any, hooks: Any = None) -> None:
        kept = {
            name: hook
            for name, hook in (hooks or {}).items()
            if hook is not None or name in DEFAULT_HOOKS
        }
        register(self, kept)

    return wrapped


# --- distributed training on a CPU ------------------------------------------


def prepare_cpu_distributed(cfg: Any) -> None:
    """Let ``launcher='pytorch'`` work without a GPU; for the tools.

    Starts the gloo process group, which the Runner then finds, and sets
    ``cfg`` accordingly. Does nothing with a GPU, another launcher, or outside
    of torchrun. mmengine 0.10.7 and 0.11.0rc3 always call
    ``torch.cuda.set_device``; ends when they ask first.

    Args:
        cfg (Config): The whole config, changed in place: ``env_cfg``,
            ``model_wrapper_cfg``, and every SyncBN becomes BN, since CPUs
            have none.
    """
    torchrun = {'RANK', 'WORLD_SIZE'} <= os.environ.keys()
    if cfg.get('launcher') != 'pytorch' or not torchrun:
        return
    if torch.cuda.is_available():
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
        atexit.register(_leave_process_group)
    cfg.env_cfg = _with_gloo(cfg.get('env_cfg') or {})
    cfg.model_wrapper_cfg = _wrapper_without_device(cfg)
    replaced = _replace_sync_bn(list(cfg.values()))
    replaced += cfg.pop('sync_bn', None) is not None
    if replaced:
        print_log(
            f'No GPU: {replaced} x SyncBN turned into BN in the config, so '
            'statistics are those of each process.',
            logger='current',
        )


def _leave_process_group() -> None:
    """End gloo's threads: one that meets the end of Python aborts it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # they end with the last model that refers to the group
    gc.collect()


def _with_gloo(env_cfg: dict) -> dict:
    """Return ``env_cfg`` with gloo as the backend."""
    dist_cfg = {**(env_cfg.get('dist_cfg') or {}), 'backend': 'gloo'}
    return {**env_cfg, 'dist_cfg': dist_cfg}


def _wrapper_without_device(cfg: Any) -> dict:
    """Return the model wrapper's config, the user's where there is one."""
    wrapper = cfg.get('model_wrapper_cfg')
    if wrapper is None:
        wrapper = {
            'broadcast_buffers': False,
            'find_unused_parameters': cfg.get('find_unused_parameters', False),
        }
    wrapper = {'type': 'MMDistributedDataParallel', **wrapper}
    if wrapper['type'] == 'MMDistributedDataParallel':
        # Without the key mmengine names a GPU.
        wrapper.setdefault('device_ids', None)
    return wrapper


def _replace_sync_bn(node: Any) -> int:
    """Turn every SyncBN below ``node`` into BN and count them."""
    if isinstance(node, (list, tuple)):
        return sum(_replace_sync_bn(child) for child in node)
    if not isinstance(node, dict):
        return 0
    count = 0
    if node.get('type') in ('SyncBN', 'MMSyncBN'):
        node['type'] = 'BN'
        count = 1
    return count + sum(_replace_sync_bn(child) for child in node.values())


# --- configs ----------------------------------------------------------------


def add_config_package() -> None:
    """Let a config name ``'mmstabvim::...'`` as a base.

    mmengine 0.10.7 and 0.11.0rc3 know only their own packages, look for an
    editable install in the wrong folder, and search the bare type names of
    such a base in its package, where these configs name the toolkits' types.
    Ends when mmengine accepts any installed package, finds it by its import
    path, and leaves bare names to ``default_scope``.
    """
    config_utils.MODULE2PACKAGE.setdefault('mmstabvim', 'mmstabvim')
    find_base = config_module.Config._get_cfg_path
    if not hasattr(find_base, '__wrapped__'):
        config_module.Config._get_cfg_path = staticmethod(
            _without_own_scope(find_base)
        )
    for module in (config_module, hub_module):
        original = module.get_installed_path
        if not hasattr(original, '__wrapped__'):
            module.get_installed_path = _with_own_path(original)


def _with_own_path(get_installed_path: Callable) -> Callable:
    """Answer for this package, ask mmengine for the others."""

    @functools.wraps(get_installed_path)
    def find(package: str) -> str:
        if package == 'mmstabvim':
            return os.path.dirname(os.path.abspath(__file__))
        return get_installed_path(package)

    return find


def _without_own_scope(get_cfg_path: Callable) -> Callable:
    """Keep mmengine from marking this package's configs with its scope."""

    @functools.wraps(get_cfg_path)
    def find(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = get_cfg_path(cfg_path, filename)
        return path, None if scope == 'mmstabvim' else scope

    return find
