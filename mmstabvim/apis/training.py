"""Train from a config: the work of ``tools/train.py``."""

import argparse
import os
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device

from mmstabvim.apis import console
from mmstabvim.engine import launch
from mmstabvim.engine.mistakes import MissingFileError, SettingError
from mmstabvim.engine.resume import check_resumable, explain_resume

__all__ = ['make_config', 'make_parser', 'train']


def train(config: str | os.PathLike, **options: Any) -> Any:
    """Train a classifier or segmentor.

    Args:
        config (str | os.PathLike): Path of the config.
        **options: Those of ``tools/train.py``, such as ``work_dir``,
            ``cfg_options`` (a dict), ``resume``, ``amp``, ``seed``.

    Returns:
        Runner: After the training. :func:`.launch.training_summary` tells
        how it ended.

    Raises:
        FileNotFoundError: If the config or a checkpoint does not exist.
        KeyError: If a ``type`` is in no registry, with near names.
        TypeError: If there is no such option.
        ValueError: If a setting has no effect or a wrong value, or a data set
            cannot be read.

    Example:
        >>> from mmstabvim.apis import train
        >>> config = 'configs/vim/vim-nano-p4_1xb64-20e_digits.py'
        >>> runner = train(config, seed=1)  # doctest: +SKIP
    """
    args = console.read_options(make_parser(), [config], options)
    with launch.clear_errors():
        runner = launch.build_runner(make_config(args))
        explain_resume(runner)
        runner.train()
    return runner


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of ``tools/train.py``.

    Args:
        description (str, optional): Of the tool. Defaults to None.

    Returns:
        argparse.ArgumentParser: The parser.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='path of the config')
    launch.add_shared_options(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT|WORK_DIR',
        help='continue from this checkpoint, or from the newest one of a '
        'work dir; without a path from the newest one in --work-dir (starts '
        'anew if there is none)',
    )
    parser.add_argument(
        '--amp', action='store_true', help='use automatic mixed precision'
    )
    parser.add_argument(
        '--amp-dtype',
        choices=['float16', 'bfloat16'],
        help='with --amp (default: float16 on a GPU, bfloat16 on a CPU)',
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='train without validation'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the real total batch size over '
        'auto_scale_lr.base_batch_size of the config',
    )
    parser.add_argument('--seed', type=int, help='random seed')
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='use deterministic algorithms only (slower)',
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='start the data loader workers anew in each epoch',
    )
    return parser


def make_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the options.

    Args:
        args (argparse.Namespace): From :func:`make_parser`.

    Returns:
        Config: What the runner is built from.

    Raises:
        FileNotFoundError: If the config or a checkpoint does not exist.
        ValueError: If a setting has no effect, or a wrong value.
    """
    cfg = launch.load_config(args)
    launch.require(cfg, 'train_dataloader', 'train_cfg', 'optim_wrapper')
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp_dtype and not args.amp:
        raise SettingError('--amp-dtype needs --amp')
    if args.amp:
        _use_amp(cfg, args.amp_dtype)
    if args.resume is not None or cfg.get('resume'):
        _set_resume(cfg, args.resume or cfg.get('load_from') or 'auto')
    if args.auto_scale_lr:
        _scale_lr(cfg)
    _set_randomness(cfg, args.seed, args.deterministic)
    launch.set_loader_defaults(
        cfg, args.no_pin_memory, args.no_persistent_workers
    )
    return cfg


def _use_amp(cfg: Config, dtype: str | None) -> None:
    """Replace the optimizer wrapper by its mixed-precision version.

    float16 needs a loss scale, bfloat16 has float32's range and none.
    """
    wrapper = cfg.optim_wrapper
    name = launch.type_name(wrapper) or 'OptimWrapper'
    known = ('OptimWrapper', 'AmpOptimWrapper')
    if name not in known or 'optimizer' not in wrapper:
        raise SettingError(
            '--amp wants one optim_wrapper of type OptimWrapper, '
            f'got {dict(wrapper)}'
        )
    wrapper.type = 'AmpOptimWrapper'
    if dtype is None and name == 'OptimWrapper':
        dtype = 'bfloat16' if get_device() == 'cpu' else 'float16'
    if dtype is not None:
        wrapper.dtype = dtype
    bfloat16 = wrapper.get('dtype') == 'bfloat16'
    wrapper.setdefault('loss_scale', 1.0 if bfloat16 else 'dynamic')


def _set_resume(cfg: Config, place: str) -> None:
    """Resume from a checkpoint or work dir, ``'auto'`` for the run's own.

    Where there is none yet, the training starts as the config says, with its
    own ``load_from``: a job may always be started with ``--resume``.
    """
    try:
        checkpoint = launch.find_checkpoint(
            cfg.work_dir if place == 'auto' else place
        )
    except FileNotFoundError as error:
        if place != 'auto':
            raise MissingFileError(f'--resume: {error}') from error
        _say(f'no checkpoint in {cfg.work_dir}, starting anew')
        return
    check_resumable(checkpoint)
    _say(checkpoint)
    cfg.resume = True
    cfg.load_from = checkpoint


def _say(what: str) -> None:
    """Tell the user where the training begins; there is no logger yet."""
    print(f'--resume: {what}')  # noqa: T201


def _scale_lr(cfg: Config) -> None:
    """Turn on mmengine's scaling of the learning rate."""
    scaling: Any = cfg.get('auto_scale_lr') or {}
    if 'base_batch_size' not in scaling:
        raise SettingError(
            '--auto-scale-lr wants auto_scale_lr.base_batch_size in the '
            f'config, got auto_scale_lr={dict(scaling)}'
        )
    scaling.enable = True


def _set_randomness(
    cfg: Config, seed: int | None, deterministic: bool
) -> None:
    """Set seed and determinism, keeping what else the config says."""
    randomness = dict(cfg.get('randomness') or {})
    if seed is not None:
        randomness['seed'] = seed
    if deterministic:
        randomness['deterministic'] = True
        # PyTorch refuses to multiply matrices deterministically without it
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    cfg.randomness = randomness
