"""Count which classes a trained model takes for which.

For CONFIG and CHECKPOINT of a classifier of MMPretrain (a label per image) or
of a segmentor of MMSegmentation (a label per pixel): tests the model on the
test set, prints each class's recall, precision and, of a segmentor,
intersection over union, and the mistakes that are made most often.

MMPretrain's tool of this name also runs on the classifiers of this package,
but not on segmentors; MMSegmentation's wants masks that were written before.

Writes confusion_matrix.md, .csv, .json, .png, .pdf and .svg. The CSV has a
line for each pair of classes that occurs.
"""

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mmengine
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from rich.console import Console
from rich.progress import Progress

from mmstabvim.analysis.robustness.evaluate import choose_samples
from mmstabvim.engine import launch
from mmstabvim.registry import METRICS
from mmstabvim.reporting import style, writing

Row = dict[str, Any]

NORMALIZATIONS = ('true', 'predicted', 'all', 'none')
TRAINING = (
    'train_dataloader',
    'train_cfg',
    'optim_wrapper',
    'param_scheduler',
    'val_dataloader',
    'val_cfg',
    'val_evaluator',
)
NAMED = 40  # classes whose names a figure has room for
WRITTEN = 15  # classes up to which shares are written into the cells

PAGE = """\
# Confusion matrix

`{config}`, `{checkpoint}`: {counted:,} {unit} of {images} test images, \
{accuracy:.2f} % right.

{classes}

Classes that never occur have no recall, those never predicted no precision.

## Most frequent mistakes

{mistakes}

![Confusion matrix](confusion_matrix.png)
"""


@METRICS.register_module()
class ConfusionCounts(BaseMetric):
    """Counts of (true, predicted) pairs, a matrix with true classes as rows.

    Args:
        ignore_index (int): Label of pixels that do not count. Defaults to
            255.
    """

    default_prefix = 'confusion'

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count a batch.

        Raises:
            ValueError: If a sample has neither one label nor a mask.
        """
        for sample in data_samples:
            true, said, classes = self._labels(sample)
            kept = true != self.ignore_index
            pairs = true[kept].long() * classes + said[kept].long()
            counts = torch.bincount(pairs.flatten(), minlength=classes**2)
            self.results.append(counts.reshape(classes, classes).cpu().numpy())

    def _labels(self, sample: dict) -> tuple[torch.Tensor, torch.Tensor, int]:
        """True and predicted labels, and the number of classes."""
        if 'pred_sem_seg' in sample:
            said = sample['pred_sem_seg']['data'].squeeze()
            true = sample['gt_sem_seg']['data'].squeeze().to(said)
            return true, said, len(self.dataset_meta['classes'])
        true, scores = sample.get('gt_label'), sample.get('pred_score')
        if true is None or scores is None or true.numel() != 1:
            raise ValueError(
                'each sample must have one gt_label and a pred_score, or a '
                f'gt_sem_seg, got {sorted(sample)}'
            )
        said = scores.argmax().reshape(1)
        return true.reshape(1).to(said), said, len(scores)

    def compute_metrics(self, results: list) -> dict[str, np.ndarray]:
        """Add all up."""
        return dict(matrix=np.sum(results, axis=0))


class ShowProgress(Hook):
    """Move a bar with each batch."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task('test set', total=None)

    def after_test_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """One batch is done."""
        total = len(runner.test_dataloader)
        self.progress.update(self.task, total=total, completed=batch_idx + 1)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', help='path of the config')
    launch.add_checkpoint(parser)
    add('--samples', type=int, help='test images, drawn (default: all)')
    add('--seed', type=int, default=0, help='of the choice of images')
    add('--device', help='default: the GPU if there is one, else the CPU')
    add(
        '--normalize',
        choices=NORMALIZATIONS,
        default='true',
        help='what the figure shows shares of: of each true class, each '
        'predicted one, of all; or counts (default: %(default)s)',
    )
    add(
        '--top',
        type=int,
        default=10,
        metavar='N',
        help='mistakes to list (default: %(default)s)',
    )
    add('--out', type=Path, metavar='DIR', help='folder for the results')
    launch.add_cfg_options(parser)
    args = parser.parse_args(argv)
    for name in ('samples', 'top'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name} must be at least 1, got {value}')
    gpu = args.device not in (None, 'cpu')
    if gpu and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: there is no GPU')
    return args


# ---------------------------------------------------------------- evaluation


def prepare(args: argparse.Namespace, folder: str) -> Config:
    """The config, made to count pairs of classes and nothing else."""
    args.checkpoint = launch.find_checkpoint(args.checkpoint)
    cfg = launch.load_config(
        argparse.Namespace(
            config=args.config,
            cfg_options=dict(args.cfg_options),
            work_dir=folder,
            launcher='none',
            local_rank=0,
        )
    )
    if 'test_dataloader' not in cfg:
        raise ValueError('the config needs a test_dataloader, got none')
    for name in TRAINING:
        cfg.pop(name, None)
    cfg.load_from, cfg.resume = args.checkpoint, False
    evaluators = cfg.get('test_evaluator') or {}
    if isinstance(evaluators, dict):
        evaluators = [evaluators]
    ignore = [e['ignore_index'] for e in evaluators if 'ignore_index' in e]
    cfg.test_evaluator = [
        dict(
            type='mmstabvim.ConfusionCounts',
            ignore_index=ignore[0] if ignore else 255,
        )
    ]
    cfg.test_cfg = cfg.get('test_cfg') or {}
    cfg.randomness = dict(seed=args.seed)
    cfg.log_level = 'ERROR'
    cfg.setdefault('visualizer', ConfigDict(type='Visualizer'))
    cfg.visualizer.vis_backends = None
    launch.set_loader_defaults(cfg, no_pin_memory=True)
    if args.samples is not None:
        choose_samples(cfg, args.samples, args.seed)
    return cfg


def count_pairs(
    args: argparse.Namespace, progress: Progress
) -> tuple[np.ndarray, list[str], int]:
    """Test the model.

    Returns:
        tuple[ndarray, list[str], int]: Counts (classes, classes) with true
        classes as rows, their names, and the number of images.
    """
    with tempfile.TemporaryDirectory() as folder, launch.clear_errors():
        runner = launch.build_runner(prepare(args, folder))
        if args.device is not None:
            runner.model.to(args.device)
        runner.load_checkpoint = partial(runner.load_checkpoint, strict=True)
        runner.register_hook(ShowProgress(progress))
        matrix = runner.test()['confusion/matrix']
        dataset = runner.test_dataloader.dataset
    names = list(dataset.metainfo.get('classes') or [])
    if len(names) != len(matrix):
        names = [str(i) for i in range(len(matrix))]
    return matrix, names, len(dataset)


# ------------------------------------------------------------------- results


def share(part: float, whole: float) -> float | None:
    """In percent; None of nothing."""
    return 100 * float(part) / float(whole) if whole else None


def class_rows(
    matrix: np.ndarray, names: Sequence[str], pixels: bool
) -> list[Row]:
    """Recall and precision of each class, in percent."""
    rows = []
    for i, name in enumerate(names):
        hits, true, said = matrix[i, i], matrix[i].sum(), matrix[:, i].sum()
        row = dict(name=name, count=int(true), recall=share(hits, true))
        row['precision'] = share(hits, said)
        if pixels:
            row['IoU'] = share(hits, true + said - hits)
        rows.append(row)
    return rows


def pair_rows(matrix: np.ndarray, names: Sequence[str]) -> list[Row]:
    """Pairs of classes that occur, with their share of the true class."""
    total = matrix.sum(1)
    return [
        dict(
            true=int(i),
            predicted=int(j),
            true_class=names[i],
            predicted_class=names[j],
            count=int(matrix[i, j]),
            percent_of_true=share(matrix[i, j], total[i]),
        )
        for i, j in np.argwhere(matrix)
    ]


def normalize(matrix: np.ndarray, mode: str) -> np.ndarray:
    """What a figure shows: shares in percent, or counts."""
    if mode == 'none':
        return matrix.astype(float)
    axis = dict(true=1, predicted=0, all=None)[mode]
    total = matrix.sum(axis, keepdims=True)
    return 100 * matrix / np.where(total == 0, 1, total)


LABELS = dict(
    true='% of the true class',
    predicted='% of the predicted class',
    all='% of all',
    none='count',
)


def draw(matrix: np.ndarray, names: Sequence[str], mode: str) -> Figure:
    """The matrix, true classes from top to bottom."""
    values, count = normalize(matrix, mode), len(names)
    with style.figure_style():
        figure, grid = style.panels(1, 1, 4.6)
        axes = grid[0, 0]
        image = axes.imshow(values, cmap='Blues', vmin=0)
        if count <= NAMED:
            axes.set_xticks(range(count), names, rotation=90)
            axes.set_yticks(range(count), names)
        if count <= WRITTEN:
            middle = values.max() / 2
            for (i, j), value in np.ndenumerate(values):
                color = 'white' if value > middle else 'black'
                text = f'{value:.0f}' if value else ''
                axes.text(
                    *(j, i, text),
                    **dict(ha='center', va='center', fontsize=5.5),
                    color=color,
                )
        axes.set_xlabel('predicted class')
        axes.set_ylabel('true class')
        figure.colorbar(image, ax=axes, label=LABELS[mode], shrink=0.8)
    return figure


def make_tables(
    rows: Sequence[Row], pairs: Sequence[Row], top: int
) -> tuple[str, str]:
    """Classes and mistakes, in Markdown."""
    shown = [
        dict(row, name=str(row['name']), count=f'{row["count"]:,}')
        for row in rows
    ]
    columns = dict(name='class', count='number', recall='recall, %')
    columns['precision'] = 'precision, %'
    if 'IoU' in rows[0]:
        columns['IoU'] = 'IoU, %'
    wrong = [row for row in pairs if row['true'] != row['predicted']]
    wrong.sort(key=lambda row: -row['count'])
    mistakes = [
        dict(row, count=f'{row["count"]:,}', true_class=str(row['true_class']))
        for row in wrong[:top]
    ]
    if not mistakes:
        return writing.markdown(shown, columns), 'None.'
    words = dict(true_class='true class', predicted_class='taken for')
    words |= dict(count='number', percent_of_true='% of the true class')
    return writing.markdown(shown, columns), writing.markdown(mistakes, words)


def main(argv: Sequence[str] | None = None) -> None:
    """Test, count, draw, write."""
    args = parse_args(argv)
    logging.disable(logging.INFO)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress(console=console) as progress:
        matrix, names, images = count_pairs(args, progress)
    counted = int(matrix.sum())
    pixels = counted != images
    rows = class_rows(matrix, names, pixels)
    pairs = pair_rows(matrix, names)
    classes, mistakes = make_tables(rows, pairs, args.top)
    accuracy = share(np.trace(matrix), counted)
    facts = dict(
        config=args.config,
        checkpoint=args.checkpoint,
        images=images,
        counted=counted,
        unit='pixels' if pixels else 'labels',
        accuracy=math.nan if accuracy is None else accuracy,
        classes=rows,
        matrix=matrix.tolist(),
    )
    page = PAGE.format(**facts | dict(classes=classes), mistakes=mistakes)
    default = Path('work_dirs', Path(args.config).stem, 'confusion_matrix')
    folder = args.out or default
    mmengine.mkdir_or_exist(folder)
    figure = draw(matrix, names, args.normalize)
    writing.save(folder, 'confusion_matrix', page, pairs, facts, figure)
    print(classes)
    print(f'\n{mistakes}\n')
    print(
        f'{facts["accuracy"]:.2f} % of {counted:,} {facts["unit"]} right '
        f'({images} images)'
    )
    print(f'Written: {folder / "confusion_matrix.md"}')


if __name__ == '__main__':
    main(sys.argv[1:])
