"""Test a model of a config: the work of ``tools/test.py``."""

import argparse
import os
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from mmstabvim.apis import console
from mmstabvim.apis.model import load_strictly
from mmstabvim.engine import launch
from mmstabvim.engine.mistakes import SettingError

__all__ = ['choose_out_item', 'evaluate', 'make_config', 'make_parser']

MASK_WRITERS = ('IoUMetric', 'ClassIoUMetric', 'CityscapesMetric')


def evaluate(
    config: str | os.PathLike, checkpoint: str | os.PathLike, **options: Any
) -> dict[str, Any]:
    """Test a classifier or segmentor on the test set of its config.

    Args:
        config (str | os.PathLike): Path of the config.
        checkpoint (str | os.PathLike): Path or URL of the checkpoint, or the
            work dir of a training for its newest one.
        **options: Those of ``tools/test.py``, such as ``work_dir``,
            ``cfg_options`` (a dict), ``out``, ``show_dir``, ``tta``.

    Returns:
        dict[str, Any]: Metrics by name.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        KeyError: If a ``type`` is in no registry, with near names.
        TypeError: If there is no such option.
        ValueError: If a setting has no effect or a wrong value, a weight of
            checkpoint or model does not find the other, or a data set cannot
            be read.

    Example:
        >>> from mmstabvim.apis import evaluate
        >>> evaluate('config.py', 'work_dirs/config')  # doctest: +SKIP
        {'accuracy/top1': 97.3}
    """
    args = console.read_options(make_parser(), [config, checkpoint], options)
    with launch.explain_errors():
        runner = launch.build_runner(make_config(args))
        if args.tta:
            _draw_first_view(runner)
        item = choose_out_item(args.out, args.out_item)
        if item == 'pred':
            runner.test_evaluator.metrics.append(DumpResults(args.out))
        runner.load_checkpoint = partial(load_strictly, runner.load_checkpoint)
        metrics = runner.test()
    if item == 'metrics' and is_main_process():
        mmengine.dump(metrics, args.out)
    if args.out:
        runner.logger.info(f'Results are in {args.out}')
    return metrics


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of ``tools/test.py``.

    Args:
        description (str, optional): Of the tool. Defaults to None.

    Returns:
        argparse.ArgumentParser: The parser.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='path of the config')
    launch.add_checkpoint(parser)
    launch.add_shared_options(parser)
    parser.add_argument(
        '--out',
        help='write results: predictions to a .pkl file, metrics to a .json '
        'file, or for segmentation the predicted masks to a folder',
    )
    parser.add_argument(
        '--out-item',
        choices=['metrics', 'pred'],
        help='what goes to --out, where the suffix should not decide',
    )
    parser.add_argument(
        '--amp', action='store_true', help='use automatic mixed precision'
    )
    parser.add_argument(
        '--show', action='store_true', help='show predictions in a window'
    )
    parser.add_argument('--show-dir', help='draw predictions to this folder')
    parser.add_argument(
        '--interval',
        type=int,
        help='draw every n-th sample (classification) or batch '
        '(segmentation). Defaults to 1',
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds for which a window stays open. Defaults to 2',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation with tta_model and tta_pipeline of the '
        'config (classification without them: the mean over both flips)',
    )
    return parser


def make_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the options.

    Args:
        args (argparse.Namespace): From :func:`make_parser`.

    Returns:
        Config: What the runner is built from.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        ValueError: If a setting has no effect, or a wrong value.
    """
    item = choose_out_item(args.out, args.out_item)
    cfg = launch.load_config(args)
    launch.require(cfg, 'test_dataloader', 'test_cfg', 'test_evaluator')
    cfg.load_from = launch.find_checkpoint(args.checkpoint)
    print(f'Checkpoint: {cfg.load_from}')  # noqa: T201
    cfg.resume = False
    if args.amp:
        cfg.test_cfg = dict(cfg.get('test_cfg') or {}, fp16=True)
    if args.show or args.show_dir:
        _show_predictions(cfg, args)
    if args.tta:
        _use_tta(cfg)
    if item == 'masks':
        _write_masks(cfg, args.out)
    launch.set_loader_defaults(cfg, args.no_pin_memory)
    return cfg


def choose_out_item(out: str | None, item: str | None) -> str | None:
    """Decide what goes to ``--out``.

    Args:
        out (str, optional): File or folder.
        item (str, optional): ``'metrics'`` or ``'pred'``, where the suffix
            should not decide.

    Returns:
        str | None: ``'metrics'``, ``'pred'``, ``'masks'``, or None without
        ``out``.

    Raises:
        ValueError: If the suffix does not suit.
    """
    if out is None:
        if item is not None:
            raise SettingError(f'--out-item {item} needs --out')
        return None
    suffix = Path(out).suffix
    wanted: tuple[str, ...]
    if item is None:
        item = 'metrics' if suffix in ('.json', '.yaml', '.yml') else 'pred'
    if item == 'metrics':
        wanted = ('.json', '.yaml', '.yml', '.pkl')
    else:
        item = 'pred' if suffix else 'masks'
        wanted = ('.pkl', '')
    if suffix not in wanted:
        raise SettingError(
            f'--out for --out-item {item} wants a suffix in {wanted}, '
            f'got {out!r}'
        )
    return item


def _show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the visualization hook of the toolkit."""
    segmentation = launch.is_segmentation(cfg)
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    hook = hooks.setdefault('visualization', ConfigDict())
    hook.update(show=args.show, wait_time=args.wait_time)
    hook.interval = args.interval or hook.get('interval', 1)
    visualizer = cfg.setdefault('visualizer', ConfigDict())
    visualizer.setdefault('vis_backends', [dict(type='LocalVisBackend')])
    if segmentation:
        hook.setdefault('type', 'SegVisualizationHook')
        if visualizer.get('type') in (None, 'SegLocalVisualizer'):
            visualizer.type = 'mmstabvim.SegOverlayVisualizer'
        hook.draw = True
        if args.show_dir:
            visualizer.save_dir = args.show_dir
    else:
        hook.setdefault('type', 'VisualizationHook')
        visualizer.setdefault('type', 'UniversalVisualizer')
        hook.enable = True
        hook.out_dir = args.show_dir


def _use_tta(cfg: Config) -> None:
    """Wrap the model and replace the pipeline for test-time augmentation."""
    dataset = cfg.test_dataloader.dataset
    tta_model = cfg.get('tta_model')
    pipeline = cfg.get('tta_pipeline')
    if launch.is_segmentation(cfg):
        tta_model = tta_model or dict(type='SegTTAModel')
    else:
        tta_model = tta_model or dict(type='AverageClsScoreTTA')
        pipeline = pipeline or _flip_pipeline(dataset.pipeline)
    if not pipeline:
        raise SettingError(
            '--tta wants a tta_pipeline in a segmentation config, got none'
        )
    cfg.model = ConfigDict(**tta_model, module=cfg.model)
    dataset.pipeline = pipeline


def _flip_pipeline(pipeline: list) -> list:
    """Make a pipeline that gives each image and its mirror image."""
    *steps, pack = deepcopy(pipeline)
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    transforms = [flips, [pack]]
    return [*steps, dict(type='TestTimeAug', transforms=transforms)]


def _draw_first_view(runner: Runner) -> None:
    """Let MMPretrain draw the first view of each image under TTA.

    Its hook takes a batch of images, and gets one such batch per view.
    """
    for hook in runner.hooks:
        if type(hook).__name__ == 'VisualizationHook':
            hook.after_test_iter = partial(_draw_view, hook.after_test_iter)


def _draw_view(draw: Callable, *args, data_batch: dict, **kwargs) -> None:
    """Draw one view of a batch of several."""
    first = dict(data_batch, inputs=data_batch['inputs'][0])
    draw(*args, data_batch=first, **kwargs)


def _write_masks(cfg: Config, folder: str) -> None:
    """Let the segmentation metrics write the predicted masks."""
    if not launch.is_segmentation(cfg):
        raise SettingError(
            '--out wants a .pkl or .json file for classification, '
            f'got {folder!r}'
        )
    evaluators = cfg.test_evaluator
    if isinstance(evaluators, dict):
        evaluators = [evaluators]
    for evaluator in evaluators:
        if launch.type_name(evaluator) in MASK_WRITERS:
            evaluator.output_dir = folder
            return
    raise SettingError(
        f'--out {folder!r}: masks are written by one of {MASK_WRITERS}, got '
        f'test_evaluator={cfg.test_evaluator}'
    )
