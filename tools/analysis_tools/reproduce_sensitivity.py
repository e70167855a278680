"""Redo the experiments of the matrix-spectral framework (arXiv:2602.01136).

toy: a small network on handwritten digits. How much random changes of its
images move the logits, against what Jacobian, entropy and index say; and
whether the spectral entropy of an image tells the instability of its
attribution.

table STUDY: for the trainings of configs/ablation/regularizers.py accuracy,
spectral entropy (SE), attribution condition number (ACN), Frechet distance
(FD) and instability of attributions, regularized against plain, and the
correlations over images.

Everything is written as CSV and Markdown, figures as PNG, PDF and SVG.
"""

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _robustness.evaluate import cell_config, find_checkpoint, is_ready
from mmengine.dataset import pseudo_collate
from rich.console import Console
from rich.progress import Progress
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mmstabvim.ablation import results
from mmstabvim.ablation.report_tables import plus_minus
from mmstabvim.ablation.statistics import sample
from mmstabvim.apis.trained import load_model, test_samples
from mmstabvim.evaluation import SensitivityMetric
from mmstabvim.reporting.tables import Table, to_csv, to_markdown
from mmstabvim.stability import (
    input_jacobian,
    singular_values,
    spectral_entropy,
)
from mmstabvim.visualization import line_figure, style
from mmstabvim.visualization.curves import Quantity
from mmstabvim.visualization.sensitivity import scatter_figure

Rows = list[dict[str, Any]]
WIDTH, STEPS, TRAINED = 64, 200, 1000
EPSILONS = torch.logspace(-3, 1, 13, dtype=torch.float64).tolist()
TABLED = EPSILONS[6]  # 0.1, where the change is linear in the radius
DIRECTIONS = 256
SCALES = {
    'largest': 'largest',
    'rms': 'root mean square',
    'typical': '‖J‖_F / √d',
    'norm_bound': '‖J‖',
    'entropy_bound': 'entropy bound',
    'index_bound': 'index',
}
COLUMNS = {
    'accuracy': 'accuracy, %',
    'entropy': 'SE, nats',
    'condition_number': 'ACN',
    'frechet_distance': 'FD',
    'instability': 'instability',
    'typical_gain': '‖J‖²_F / d',
}
CAUSES = ('entropy', 'condition_number')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    toy = commands.add_parser('toy', help='the small network')
    toy.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    table = commands.add_parser('table', help='checkpoints of a study')
    table.add_argument('study', type=Path, help='of tools/ablation.py run')
    table.add_argument(
        '--seed', type=int, default=0, help='of the images and changes'
    )
    for command in (toy, table):
        command.add_argument(
            '--samples', type=int, default=64, help='test images'
        )
        command.add_argument(
            '--std',
            type=float,
            default=0.02,
            help='of the changes that attributions are tried with, in units '
            'of normalized images (default: %(default)s)',
        )
        command.add_argument('--device', default='cpu')
        command.add_argument('--out', type=Path, help='folder for the results')
    return check_args(parser, parser.parse_args(argv))


def check_args(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> argparse.Namespace:
    """Refuse what makes no sense; choose a folder."""
    if args.samples < 2:
        parser.error(f'--samples must be at least 2, got {args.samples}')
    default = (
        Path('work_dirs/sensitivity')
        if args.command == 'toy'
        else args.study / 'sensitivity'
    )
    args.out = args.out or default
    return args


def metric(args: argparse.Namespace, profile: bool) -> SensitivityMetric:
    """What both experiments measure with."""
    return SensitivityMetric(
        std=args.std, profile=profile, show_progress=False
    )


# ------------------------------------------------------------ small network


def digits(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Normalized images (count, 64) and labels, in the order of the file."""
    found = load_digits()
    images = torch.from_numpy(found.data).to(args.device)
    images = (images - images.mean()) / images.std()
    return images, torch.from_numpy(found.target).to(args.device)


def train_small(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A network of two layers, trained on whole batches."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(images.shape[1], WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10)
    ).to(images)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def changes_of(model: nn.Module, x: Tensor, seed: int) -> Rows:
    """How far changes on spheres move the logits, radius by radius."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(
        DIRECTIONS, 1, x.shape[1], generator=generator, dtype=torch.float64
    ).to(x)
    directions /= directions.norm(dim=-1, keepdim=True)
    clean = model(x)
    rows = []
    for epsilon in EPSILONS:
        moved = (model(x + epsilon * directions) - clean).norm(dim=-1)
        rows.append(
            dict(
                epsilon=epsilon,
                largest=moved.max().item(),
                rms=moved.square().mean().sqrt().item(),
            )
        )
    return rows


def add_predictions(rows: Rows, values: Tensor, size: int, index: float):
    """What the spectra of the Jacobians say of these changes.

    Args:
        rows (Rows): Changed in place.
        values (Tensor): (batch, classes), singular values.
        size (int): Of an image.
        index (float): Sensitivity index.
    """
    squares = values.square()
    bound = squares[:, 0] * spectral_entropy(values, power=2).exp()
    slopes = dict(
        typical=(squares.sum(1) / size).mean().sqrt().item(),
        norm_bound=values.max().item(),
        entropy_bound=(bound / size).mean().sqrt().item(),
        index_bound=index,
    )
    for row in rows:
        row.update({k: v * row['epsilon'] for k, v in slopes.items()})


def run_toy(args: argparse.Namespace, progress: Progress) -> None:
    """Train, change, compare."""
    images, labels = digits(args)
    scaling: Rows = []
    points: Rows = []
    last = TRAINED + args.samples
    x, y = images[TRAINED:last], labels[TRAINED:last]
    bar = progress.add_task('small networks', total=len(args.seeds))
    for seed in args.seeds:
        model = train_small(images[:TRAINED], labels[:TRAINED], seed)
        tool = metric(args, profile=True)
        found = tool.measure(model, x, y, progress)
        rows = changes_of(model, x, seed)
        values = singular_values(input_jacobian(model, x))
        add_predictions(rows, values, x.shape[1], found['index'])
        scaling += [dict(facet=f'seed {seed}', **row) for row in rows]
        points += [
            dict(facet='digits, 64 pixels', series=str(seed), **row)
            for row in tool.rows
        ]
        progress.advance(bar)
    save_scaling(args.out, scaling)
    save_points(args.out, points, 'seed')


def save_scaling(folder: Path, scaling: Rows) -> None:
    """Figure, over the radius, and data of the changes."""
    write(folder / 'scaling.csv', to_csv(scaling))
    write(folder / 'scaling.md', scaling_page(scaling))
    rows = [
        dict(
            quantity='change',
            facet=row['facet'],
            series=title,
            x=row['epsilon'],
            value=row[name] / row['epsilon'],
        )
        for row in scaling
        for name, title in SCALES.items()
    ]
    figure = line_figure(
        rows,
        list(SCALES.values()),
        'changes, and what is said of them',
        [Quantity('change', 'change / radius')],
        'radius of the change of the image',
        log_x=True,
    )
    style.save(figure, folder / 'scaling')


def scaling_page(scaling: Rows) -> str:
    """Table at one radius, a column for each seed."""
    chosen = [row for row in scaling if row['epsilon'] == TABLED]
    rows = [
        dict(
            quantity=title,
            **{row['facet']: row[name] / TABLED for row in chosen},
        )
        for name, title in SCALES.items()
    ]
    text = [[str(v) for v in shorten(row).values()] for row in rows]
    align = 'l' + 'r' * len(chosen)
    table = Table('scaling', '', '', [*rows[0]], text, rows, align)
    return (
        f'Changes of the logits over the radius, {TABLED:.3g}, of the change '
        f'of the image, and what is said of them.\n\n{to_markdown(table)}\n'
    )


# ------------------------------------------------------- entropy, instability


def save_points(folder: Path, points: Rows, label: str) -> None:
    """Figure, data and rank correlations over images."""
    write(folder / 'images.csv', to_csv(points))
    shown = [
        row
        for row in points
        if all(math.isfinite(row[name]) for name in (*CAUSES, 'instability'))
    ]
    figure = scatter_figure(
        shown,
        style.unique(shown, 'series'),
        label,
        [
            Quantity('entropy', 'spectral entropy, nats'),
            Quantity('condition_number', 'attribution condition number'),
        ],
        Quantity('instability', 'instability of the attribution'),
    )
    style.save(figure, folder / 'images')
    rows = correlations(points)
    table = Table(
        'correlations',
        '',
        '',
        [
            'model',
            'seed',
            'images',
            'entropy',
            'p',
            'condition number',
            'p',
        ],
        [[str(v) for v in shorten(row).values()] for row in rows],
        rows,
        'lrrrrrr',
    )
    write(folder / 'correlations.csv', to_csv(rows))
    write(
        folder / 'correlations.md',
        "Spearman's rank correlation with the instability over images.\n\n"
        + to_markdown(table)
        + '\n',
    )


def correlations(points: Rows) -> Rows:
    """Rank correlations of each model's images with their instability."""
    rows = []
    groups: dict[tuple, Rows] = {}
    for row in points:
        key = row['facet'], row.get('seed', row['series'])
        groups.setdefault((row['series'], *key), []).append(row)
    for (series, facet, seed), images in groups.items():
        line = dict(model=f'{facet}, {series}', seed=seed, images=len(images))
        unstable = [row['instability'] for row in images]
        for name in CAUSES:
            found = spearmanr([row[name] for row in images], unstable)
            line[name] = float(found.statistic)
            line[f'{name}_p'] = float(found.pvalue)
        rows.append(line)
    return rows


def shorten(row: dict[str, Any]) -> dict[str, Any]:
    """Three digits."""
    return {
        name: f'{value:.3g}' if isinstance(value, float) else value
        for name, value in row.items()
    }


# ----------------------------------------------------------- a study's table


def measure_cell(
    cell: results.Result, args: argparse.Namespace, progress: Progress
) -> tuple[dict[str, float], Rows]:
    """Measure the last checkpoint of one training."""
    options = argparse.Namespace(
        config=str(cell_config(cell.folder)),
        checkpoint=str(find_checkpoint(cell.folder)),
        cfg_options={},
        device=args.device,
        samples=args.samples,
        seed=args.seed,
    )
    cfg, model = load_model(options)
    items = list(test_samples(options, cfg))
    data = model.data_preprocessor(pseudo_collate(items), False)
    labels = torch.cat([s.gt_label for s in data['data_samples']])
    tool = metric(args, profile=False)
    found = tool.measure(model, data['inputs'], labels, progress)
    return found, tool.rows


def run_table(args: argparse.Namespace, progress: Progress) -> None:
    """Measure all checkpoints of a study."""
    study = results.read_study(args.study)
    ready = [cell for cell in study.cells if is_ready(cell)]
    for cell in study.cells:
        if cell not in ready:
            progress.console.print(f'{cell.name}: left out, {cell.status}')
    if not ready:
        raise ValueError(
            f'{args.study} must have a finished training with its '
            f'checkpoint, got none in {len(study.cells)} cells'
        )
    ((label, plain),) = study.baseline.items() or [('', '')]
    cells: Rows = []
    points: Rows = []
    bar = progress.add_task('checkpoints', total=len(ready))
    for cell in ready:
        found, images = measure_cell(cell, args, progress)
        progress.advance(bar)
        others = [v for k, v in cell.labels.items() if k != label]
        key = dict(
            facet=', '.join(others) or 'all',
            series=cell.labels.get(label, cell.name),
            seed=cell.seed,
        )
        score = cell.final(study.metric)
        cells.append(dict(key, accuracy=score, **found))
        points += [dict(key, **row) for row in images]
    write(args.out / 'cells.csv', to_csv(cells))
    write(args.out / 'table.md', page(cells, plain, args))
    save_points(args.out, points, label)


def page(cells: Rows, plain: str, args: argparse.Namespace) -> str:
    """The table with a few words."""
    rows = summarize(cells, plain)
    head = ['data', 'model', 'seeds', *COLUMNS.values(), 'ΔSE, %', 'ΔFD, %']
    lines = [[str(row[name]) for name in row] for row in rows]
    table = Table('table', '', '', head, lines, rows, 'll' + 'r' * 9)
    bits = 1 / math.log(2)
    return (
        f'Mean ± standard deviation over seeds, {args.samples} test images '
        f'each; attributions under Gaussian changes of {args.std:g} in units '
        f'of normalized images. ΔSE and ΔFD: of the means, against {plain}. '
        f'SE in bits is {bits:.4f} times as large.\n\n{to_markdown(table)}\n'
    )


def summarize(cells: Rows, plain: str) -> Rows:
    """A line for each combination, ready to print."""
    groups: dict[tuple, Rows] = {}
    for cell in cells:
        groups.setdefault((cell['facet'], cell['series']), []).append(cell)
    rows = []
    for (facet, series), group in groups.items():
        line: dict[str, Any] = dict(data=facet, model=series, seeds=len(group))
        for name in COLUMNS:
            values = [c[name] for c in group if c[name] is not None]
            line[name] = plus_minus(sample(values))
        for name in ('entropy', 'frechet_distance'):
            line[f'{name}_change'] = change(
                group, groups.get((facet, plain)), name
            )
        rows.append(line)
    return rows


def change(group: Rows, reference: Rows | None, name: str) -> str:
    """Percent by which a mean differs from the reference's."""
    if not reference or group is reference:
        return ''
    new, old = (
        sum(cell[name] for cell in cells) / len(cells)
        for cells in (group, reference)
    )
    return f'{100 * (new / old - 1):+.1f}'.replace('-', '\N{MINUS SIGN}')


def write(path: Path, text: str) -> None:
    """Write a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the experiments."""
    args = parse_args(argv)
    logging.disable(logging.INFO)
    args.out.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as progress:
        if args.command == 'toy':
            run_toy(args, progress)
        else:
            run_table(args, progress)
    print(f'figures and data are in {args.out}')


if __name__ == '__main__':
    main()
