"""Train a classification or segmentation model from a config."""

import argparse
import os
import sys
from collections.abc import Sequence

# first, to say what is missing of OpenMMLab
import mmstabvim.engine  # noqa: F401

# isort: split
from mmengine.config import Config
from mmengine.device import get_device

from mmstabvim.engine import launch
from mmstabvim.engine.mistakes import MissingFileError
from mmstabvim.engine.resume import check_resumable, explain_resume


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    args = parser.parse_args(argv)
    if args.amp_dtype and not args.amp:
        parser.error('--amp-dtype needs --amp')
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the options to the config, in place."""
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        use_amp(cfg, args.amp_dtype)
    if args.resume is not None or cfg.get('resume'):
        set_resume(cfg, args.resume or cfg.get('load_from') or 'auto')
    if args.auto_scale_lr:
        scale_lr(cfg)
    set_randomness(cfg, args.seed, args.deterministic)
    launch.set_loader_defaults(
        cfg, args.no_pin_memory, args.no_persistent_workers
    )


def use_amp(cfg: Config, dtype: str | None) -> None:
    """Replace the optimizer wrapper by its mixed-precision version.

    float16 needs a loss scale, bfloat16 has float32's range and none.
    """
    wrapper = cfg.optim_wrapper
    name = launch.type_name(wrapper) or 'OptimWrapper'
    known = ('OptimWrapper', 'AmpOptimWrapper')
    if name not in known or 'optimizer' not in wrapper:
        raise ValueError(
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


def set_resume(cfg: Config, place: str) -> None:
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
        print(f'--resume: no checkpoint in {cfg.work_dir}, starting anew')
        return
    check_resumable(checkpoint)
    print(f'--resume: {checkpoint}')
    cfg.resume = True
    cfg.load_from = checkpoint


def scale_lr(cfg: Config) -> None:
    """Turn on mmengine's scaling of the learning rate."""
    scaling = cfg.get('auto_scale_lr') or {}
    if 'base_batch_size' not in scaling:
        raise ValueError(
            '--auto-scale-lr wants auto_scale_lr.base_batch_size in the '
            f'config, got auto_scale_lr={dict(scaling)}'
        )
    scaling.enable = True


def set_randomness(cfg: Config, seed: int | None, deterministic: bool) -> None:
    """Set seed and determinism, keeping what else the config says."""
    randomness = dict(cfg.get('randomness') or {})
    if seed is not None:
        randomness['seed'] = seed
    if deterministic:
        randomness['deterministic'] = True
        # PyTorch refuses to multiply matrices deterministically without it
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    cfg.randomness = randomness


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then say where the results are."""
    args = parse_args(argv)
    with launch.explain_errors():
        cfg = launch.load_config(args)
        launch.require(cfg, 'train_dataloader', 'train_cfg', 'optim_wrapper')
        merge_args(cfg, args)
        runner = launch.build_runner(cfg)
        explain_resume(runner)
        runner.train()
    runner.logger.info(launch.training_summary(runner))


if __name__ == '__main__':
    sys.exit(launch.run_tool(main))
