"""From a command line to a config and a runner, as the tools share it.

The tools are thin: they read the command line and change the config. An
installed tool can import only from the package, so the rest is here.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmstabvim import compat, stack
from mmstabvim.engine.error_hints import explain_errors
from mmstabvim.engine.mistakes import SettingError, run_tool
from mmstabvim.engine.options import (
    add_cfg_options,
    add_checkpoint,
    add_shared_options,
)
from mmstabvim.engine.schedule import fit_to_runner
from mmstabvim.engine.settings import (
    check_file_settings,
    check_values,
    merge_options,
    read_config,
)
from mmstabvim.engine.training_summary import training_summary
from mmstabvim.engine.work_dir import check_file, find_checkpoint

__all__ = [
    'LOADERS',
    'add_cfg_options',
    'add_checkpoint',
    'add_shared_options',
    'build_runner',
    'check_file',
    'explain_errors',
    'find_checkpoint',
    'is_segmentation',
    'load_config',
    'read_settings',
    'require',
    'run_tool',
    'set_loader_defaults',
    'training_summary',
    'type_name',
]

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')

_LAUNCHED = {
    'pytorch': ('RANK', 'torchrun, as tools/dist_train.sh does'),
    'slurm': ('SLURM_PROCID', 'srun, as tools/slurm_train.sh does'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'mpirun'),
}
"""Variable that each launcher sets for its processes, and its command."""


def load_config(args: argparse.Namespace) -> Config:
    """Load the config and apply the shared options.

    ``--cfg-options`` come first, so every other option sees them.

    Args:
        args (argparse.Namespace): With ``config`` and the shared options.

    Returns:
        Config: The merged config, with ``work_dir`` and ``launcher`` set.

    Raises:
        FileNotFoundError: If there is no such config file.
        ValueError: If a setting has no effect, or a wrong value.
    """
    cfg = read_settings(args.config, args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(args.config).stem))
    _check_work_dir(cfg.work_dir)
    _set_launcher(cfg, args)
    return cfg


def read_settings(path: str, options: dict[str, Any]) -> Config:
    """Read a config and apply ``--cfg-options``.

    Args:
        path (str): The config file.
        options (dict): Dotted path to value.

    Returns:
        Config: The merged config.

    Raises:
        FileNotFoundError: If there is no such config file.
        ValueError: If a setting has no effect, or a wrong value.
    """
    cfg, file = read_config(path)
    _check_toolkit(cfg.get('default_scope'))
    merge_options(cfg, options)
    check_file_settings(cfg, file)
    check_values(cfg)
    if not cfg.get('model'):
        raise SettingError(
            f'config file {path!r} must have a model, got {sorted(cfg)}'
        )
    return cfg


def _check_toolkit(scope: str | None) -> None:
    """Refuse a toolkit that cannot be imported.

    mmengine goes on without it, and then does not find the first type of it.
    """
    problem = stack.find_problem(scope) if scope in stack.NEEDS else None
    if problem is not None:
        raise SettingError(
            f'default_scope={scope!r} cannot be used: {problem}'
        )


def require(cfg: Config, *names: str) -> None:
    """Refuse a config without the settings that a tool needs.

    Args:
        cfg (Config): The config.
        *names (str): Settings.

    Raises:
        ValueError: If one is missing or None.
    """
    missing = [name for name in names if cfg.get(name) is None]
    if missing:
        raise SettingError(
            f'config file {cfg.filename!r} must have {", ".join(names)}, '
            f'got none of {", ".join(missing)}'
        )


def _check_work_dir(work_dir: Any) -> None:
    """Refuse a work dir that cannot be one."""
    if not isinstance(work_dir, str) or not work_dir.strip():
        raise SettingError(f'--work-dir wants a folder, got {work_dir!r}')
    if Path(work_dir).is_file():
        raise SettingError(
            f'--work-dir wants a folder, got the file {work_dir!r}'
        )


def _set_launcher(cfg: Config, args: argparse.Namespace) -> None:
    """Pass the launcher on and prepare a distributed job without a GPU."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.launcher == 'none':
        return
    on_cpu = get_device() == 'cpu'
    if on_cpu and args.launcher != 'pytorch':
        raise SettingError(
            '--launcher: without a GPU it must be none or pytorch, '
            f'got {args.launcher!r}'
        )
    variable, starter = _LAUNCHED[args.launcher]
    if variable not in os.environ:
        raise SettingError(
            f'--launcher {args.launcher} wants to be started by {starter}, '
            f'which sets {variable}; for one process leave it out'
        )
    if on_cpu:
        compat.prepare_cpu_distributed(cfg)


def is_segmentation(cfg: Config) -> bool:
    """Tell if the config is one of MMSegmentation.

    Args:
        cfg (Config): Its ``default_scope`` decides.

    Returns:
        bool: False for classification.
    """
    return cfg.get('default_scope') == 'mmseg'


def type_name(cfg: dict) -> str:
    """Return the name of the class that a part of a config asks for.

    Args:
        cfg (dict): With ``type``, a name with or without scope or a class.

    Returns:
        str: The bare name, empty without ``type``.
    """
    kind = cfg.get('type', '')
    name = kind if isinstance(kind, str) else kind.__name__
    return name.rpartition('.')[2]


def set_loader_defaults(
    cfg: Config, no_pin_memory: bool, no_persistent_workers: bool = False
) -> None:
    """Fill in the defaults of data loaders, as MMPretrain's tools do.

    Args:
        cfg (Config): Changed in place.
        no_pin_memory (bool): Never pin memory, whatever the config says.
        no_persistent_workers (bool): Start the workers anew each epoch.
            Defaults to False.
    """
    for name in LOADERS:
        loader = cfg.get(name)
        if not isinstance(loader, dict):
            continue
        if not is_segmentation(cfg):
            loader.setdefault('collate_fn', dict(type='default_collate'))
        loader.setdefault('pin_memory', torch.cuda.is_available())
        loader.setdefault('persistent_workers', True)
        if no_pin_memory:
            loader['pin_memory'] = False
        # PyTorch refuses persistent workers where there are no workers
        if no_persistent_workers or not loader.get('num_workers'):
            loader['persistent_workers'] = False


def build_runner(cfg: Config) -> Any:
    """Build the runner that the config asks for.

    Args:
        cfg (Config): With ``runner_type`` for another one than
            ``mmengine.Runner``.

    Returns:
        Runner: The runner; one of mmengine's own kind fits its schedule
        into a training that is shorter than the warm-up.
    """
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    runner = Runner.from_cfg(cfg)
    fit_to_runner(runner)
    return runner
