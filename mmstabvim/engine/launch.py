"""What ``tools/train.py`` and ``tools/test.py`` share.

The tools are thin: they read the command line and change the config. What
both need is here, because an installed tool can import only from the package.
"""

import argparse
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmstabvim import compat, registry, stack
from mmstabvim.engine.config_file import read_config
from mmstabvim.engine.hooks.earlier_layout_hook import EarlierLayoutHook
from mmstabvim.engine.mistakes import SettingError, UnknownTypeError, run_tool
from mmstabvim.engine.schedule import fit_to_runner
from mmstabvim.engine.settings_check import check_file_settings, merge_options
from mmstabvim.engine.values_check import check_values
from mmstabvim.engine.work_dir import check_file, find_checkpoint

__all__ = [
    'LOADERS',
    'add_cfg_options',
    'add_checkpoint',
    'add_shared_options',
    'build_runner',
    'check_file',
    'clear_errors',
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

# What each launcher tells its processes.
_LAUNCHED = {
    'pytorch': ('RANK', 'torchrun, as tools/dist_train.sh does'),
    'slurm': ('SLURM_PROCID', 'srun, as tools/slurm_train.sh does'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'mpirun'),
}


class _OptionAction(DictAction):
    """``DictAction`` that says what is wrong with ``--cfg-options key``."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Refuse a value without ``=``, and brackets that do not match."""
        for value in values:
            if '=' not in value:
                parser.error(
                    f'{option_string} wants key=value pairs, got {value!r}'
                )
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:
            parser.error(f'{option_string}: {error}')


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument that :func:`find_checkpoint` takes.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
    """
    parser.add_argument(
        'checkpoint',
        metavar='CHECKPOINT|WORK_DIR',
        help='path or URL of the checkpoint, or the work dir of a training '
        'for its newest one',
    )


def add_cfg_options(
    parser: argparse.ArgumentParser, help_text: str | None = None
) -> None:
    """Add ``--cfg-options``; the default is an empty dict.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
        help_text (str, optional): Defaults to None, for settings of one
            config.
    """
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_OptionAction,
        default={},
        metavar='KEY=VALUE',
        help=help_text
        or 'change settings of the config, for instance '
        'optim_wrapper.optimizer.lr=1e-4 or "key=[(a,b),(c,d)]"; one that '
        'nothing reads is refused',
    )


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing have in common.

    Args:
        parser (argparse.ArgumentParser): Changed in place.
    """
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints (default: work_dir of the '
        'config, or work_dirs/ and the name of the config)',
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--no-pin-memory',
        action='store_true',
        help='do not copy batches to pinned memory',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed job were started',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


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
    """Whether the config is one of MMSegmentation.

    Args:
        cfg (Config): Its ``default_scope`` decides.

    Returns:
        bool: False for classification.
    """
    return cfg.get('default_scope') == 'mmseg'


def type_name(cfg: dict) -> str:
    """Name of the class that a part of a config asks for.

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
    """Fill in what the configs leave to the tools, as in MMPretrain.

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
        runner = RUNNERS.build(cfg)
    else:
        runner = Runner.from_cfg(cfg)
        fit_to_runner(runner)
    runner.register_hook(EarlierLayoutHook())
    return runner


@contextmanager
def clear_errors() -> Iterator[None]:
    """Say more about a misspelt ``type`` and about unreadable data.

    Raises:
        KeyError: With near names, if a ``type`` is in no registry.
        ValueError: With the folders searched, if a dataset failed to load.
    """
    try:
        yield
    except Exception as error:
        unknown = _unknown_type(error)
        hint = unknown and registry.suggest_types(unknown)
        if unknown and (hint or unknown is not error):
            raise UnknownTypeError(
                f'{unknown.args[0]} {hint or ""}'
            ) from error
        dataset = _dataset_being_loaded(error)
        if dataset is not None:
            raise SettingError(_describe_data(dataset, error)) from error
        raise


def _unknown_type(error: Exception) -> KeyError | None:
    """The error about a ``type``; mmengine has none for an optimizer's."""
    if isinstance(error, KeyError):
        return error
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_locals.get('optimizer_cls', error) is None:
            name = frame.f_locals['self'].optimizer_cfg['type']
            return KeyError(f'{name} is not in the optimizer registry.')
    return None


def _dataset_being_loaded(error: Exception) -> Any:
    """Find the dataset whose annotations were being read, or None."""
    dataset = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == 'full_init':
            # the innermost one: a wrapper loads what it wraps
            dataset = frame.f_locals.get('self')
    return dataset


def _describe_data(dataset: Any, error: Exception) -> str:
    """Name the folders and files of a dataset and what is in them."""
    prefix = getattr(dataset, 'data_prefix', None) or {}
    places = {
        'data_root': getattr(dataset, 'data_root', None),
        'ann_file': getattr(dataset, 'ann_file', None),
        **(prefix if isinstance(prefix, dict) else {'data_prefix': prefix}),
    }
    lines = [
        f'{name}={str(path)!r} ({_describe_path(Path(path))})'
        for name, path in places.items()
        if path
    ]
    return (
        f'{type(dataset).__name__} found no data that it can use: '
        f'{", ".join(lines) or "no folder given"}. {error}'
    )


def _describe_path(path: Path) -> str:
    """Say whether a path is there and what it holds."""
    if path.is_dir():
        count = sum(1 for _ in path.iterdir())
        return f'{count} entries' if count else 'an empty folder'
    return 'a file' if path.exists() else 'does not exist'


def training_summary(runner: Any) -> str:
    """Tell how a training ended and where its results are.

    Args:
        runner (Runner): After ``train``.

    Returns:
        str: Several lines: last metrics, checkpoints, curves.
    """
    lines = ['Training is done.']
    metrics = _last_metrics(runner)
    if metrics:
        lines.append(f'{_split_name(runner.cfg)}: {metrics}')
    try:
        last = find_checkpoint(runner.work_dir)
    except FileNotFoundError:
        last = 'none'
    lines.append(f'Last checkpoint: {last}')
    best = runner.message_hub.runtime_info.get('best_ckpt')
    if best:
        lines.append(f'Best checkpoint: {best}')
    curves = Path(runner.log_dir, 'vis_data')
    if (curves / 'scalars.json').exists():
        lines.append(f'Curves: {curves / "scalars.json"}')
    if any(curves.glob('events.out.tfevents*')):
        lines.append(f'TensorBoard: tensorboard --logdir {runner.work_dir}')
    return '\n'.join(lines)


def _last_metrics(runner: Any) -> str:
    """List the metrics of the last validation, empty if there was none."""
    skip = {'val/time', 'val/data_time'}
    return ', '.join(
        f'{name.removeprefix("val/")} {buffer.current():.2f}'
        for name, buffer in runner.message_hub.log_scalars.items()
        if name.startswith('val/') and name not in skip
    )


def _split_name(cfg: Config) -> str:
    """Name the images behind the metrics: often the test set itself."""
    loaders = [cfg.get(name) or {} for name in LOADERS[1:]]
    if loaders[0].get('dataset') == loaders[1].get('dataset'):
        return 'Test set'
    return 'Validation set'
