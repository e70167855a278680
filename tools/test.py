"""Test a classification or segmentation model from a config."""

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

# first, to say what is missing of OpenMMLab
import mmstabvim.engine  # noqa: F401

# isort: split
import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from mmstabvim.engine import launch

MASK_WRITERS = ('IoUMetric', 'ClassIoUMetric', 'CityscapesMetric')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    args = parser.parse_args(argv)
    try:
        args.out_item = choose_out_item(args.out, args.out_item)
    except ValueError as error:
        parser.error(str(error))
    return args


def choose_out_item(out: str | None, item: str | None) -> str | None:
    """Decide what goes to ``--out``: metrics, pred, masks or nothing."""
    if out is None:
        if item is not None:
            raise ValueError(f'--out-item {item} needs --out')
        return None
    suffix = Path(out).suffix
    if item is None:
        item = 'metrics' if suffix in ('.json', '.yaml', '.yml') else 'pred'
    if item == 'metrics':
        wanted = ('.json', '.yaml', '.yml', '.pkl')
    else:
        item = 'pred' if suffix else 'masks'
        wanted = ('.pkl', '')
    if suffix not in wanted:
        raise ValueError(
            f'--out for --out-item {item} wants a suffix in {wanted}, '
            f'got {out!r}'
        )
    return item


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the options to the config, in place."""
    cfg.load_from = launch.find_checkpoint(args.checkpoint)
    print(f'Checkpoint: {cfg.load_from}')
    cfg.resume = False
    if args.amp:
        cfg.test_cfg = dict(cfg.get('test_cfg') or {}, fp16=True)
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    if args.tta:
        use_tta(cfg)
    if args.out_item == 'masks':
        write_masks(cfg, args.out)
    launch.set_loader_defaults(cfg, args.no_pin_memory)


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
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
        visualizer.setdefault('type', 'SegLocalVisualizer')
        hook.draw = True
        if args.show_dir:
            visualizer.save_dir = args.show_dir
    else:
        hook.setdefault('type', 'VisualizationHook')
        visualizer.setdefault('type', 'UniversalVisualizer')
        hook.enable = True
        hook.out_dir = args.show_dir


def use_tta(cfg: Config) -> None:
    """Wrap the model and replace the pipeline for test-time augmentation."""
    dataset = cfg.test_dataloader.dataset
    tta_model = cfg.get('tta_model')
    pipeline = cfg.get('tta_pipeline')
    if launch.is_segmentation(cfg):
        tta_model = tta_model or dict(type='SegTTAModel')
    else:
        tta_model = tta_model or dict(type='AverageClsScoreTTA')
        pipeline = pipeline or flip_pipeline(dataset.pipeline)
    if not pipeline:
        raise ValueError(
            '--tta wants a tta_pipeline in a segmentation config, got none'
        )
    cfg.model = ConfigDict(**tta_model, module=cfg.model)
    dataset.pipeline = pipeline


def flip_pipeline(pipeline: list) -> list:
    """Make a pipeline that gives each image and its mirror image."""
    *steps, pack = deepcopy(pipeline)
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    transforms = [flips, [pack]]
    return [*steps, dict(type='TestTimeAug', transforms=transforms)]


def draw_first_view(runner: Runner) -> None:
    """Let MMPretrain draw the first view of each image under TTA.

    Its hook takes a batch of images, and gets one such batch per view.
    """
    for hook in runner.hooks:
        if type(hook).__name__ == 'VisualizationHook':
            hook.after_test_iter = partial(draw_view, hook.after_test_iter)


def draw_view(draw: Callable, *args, data_batch: dict, **kwargs) -> None:
    """Draw one view of a batch of several."""
    first = dict(data_batch, inputs=data_batch['inputs'][0])
    draw(*args, data_batch=first, **kwargs)


def write_masks(cfg: Config, folder: str) -> None:
    """Let the segmentation metrics write the predicted masks."""
    if not launch.is_segmentation(cfg):
        raise ValueError(
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
    raise ValueError(
        f'--out {folder!r}: masks are written by one of {MASK_WRITERS}, got '
        f'test_evaluator={cfg.test_evaluator}'
    )


def load_strictly(load: Callable, *args, **kwargs) -> dict:
    """Load a checkpoint that must fit the model exactly.

    mmengine only warns about a misfit, and would test random weights.
    """
    try:
        return load(*args, strict=True, **kwargs)
    except RuntimeError as error:
        raise ValueError(
            f'the checkpoint does not fit the model of the config: {error}'
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Test, then write what ``--out`` asks for."""
    args = parse_args(argv)
    with launch.explain_errors():
        cfg = launch.load_config(args)
        launch.require(cfg, 'test_dataloader', 'test_cfg', 'test_evaluator')
        merge_args(cfg, args)
        runner = launch.build_runner(cfg)
        if args.tta:
            draw_first_view(runner)
        if args.out_item == 'pred':
            runner.test_evaluator.metrics.append(DumpResults(args.out))
        runner.load_checkpoint = partial(load_strictly, runner.load_checkpoint)
        metrics = runner.test()
    if args.out_item == 'metrics' and is_main_process():
        mmengine.dump(metrics, args.out)
    if args.out:
        runner.logger.info(f'Results are in {args.out}')


if __name__ == '__main__':
    sys.exit(launch.run_tool(main))
