"""Redo the experiments of the matrix-spectral framework (arXiv:2602.01136).

toy: a small network on handwritten digits. How much random changes of its
images move the logits, against what Jacobian, entropy and index say; and
whether the spectral entropy of an image tells the instability of its
attribution.

table STUDY: for the trainings of configs/ablation/regularizers.py accuracy,
spectral entropy (SE), attribution condition number (ACN), Frechet distance
(FD) and instability of attributions, regularized against plain, and the
correlations over images.

Everything is written as CSV and Markdown, figures as PNG.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from rich.progress import Progress
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mmstabvim.ablation import results
from mmstabvim.ablation.report_tables import plus_minus
from mmstabvim.ablation.statistics import sample
from mmstabvim.analysis.robustness.evaluate import (
    cell_config,
    find_checkpoint,
    ready_cells,
)
from mmstabvim.apis import console
from mmstabvim.apis.trained import load_model, test_samples
from mmstabvim.evaluation import SensitivityMetric
from mmstabvim.reporting import (
    add_formats,
    make_table,
    style,
    to_csv,
    to_markdown,
)
from mmstabvim.stability import (
    input_jacobian,
    singular_values,
    spectral_entropy,
)
from mmstabvim.visualization import Quantity, line_figure, scatter_figure

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
    text = 'of the changes for attributions, in units of normalized images'
    for command in (toy, table):
        add = command.add_argument
        add('--samples', type=int, default=64, help='test images')
        add('--std', type=float, default=0.02, help=text)
        add('--device', default='cpu')
        add('--out', type=Path, help='folder for the results')
        add_formats(command)
    args = parser.parse_args(argv)
    if args.samples < 2:
        parser.error(f'--samples must be at least 2, got {args.samples}')
    toy_out = Path('work_dirs/sensitivity')
    is_toy = args.command == 'toy'
    args.out = args.out or (toy_out if is_toy else args.study / 'sensitivity')
    return args


def metric(args: argparse.Namespace, profile: bool) -> SensitivityMetric:
    """Make the metric of both experiments."""
    return SensitivityMetric(
        std=args.std, profile=profile, show_progress=False
    )


# ------------------------------------------------------------ small network


def digits(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Load normalized images (count, 64) and labels, in the file's order."""
    found = load_digits()
    images = torch.from_numpy(found.data).to(args.device)
    images = (images - images.mean()) / images.std()
    return images, torch.from_numpy(found.target).to(args.device)


def train_small(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Train a network of two layers on whole batches."""
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
    """Measure how far changes on spheres move the logits, by radius."""
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
    """Predict these changes from the spectra of the Jacobians.

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
    save_scaling(args, scaling)
    save_points(args, points, 'seed')


def save_scaling(args: argparse.Namespace, scaling: Rows) -> None:
    """Draw the changes over the radius; write their data."""
    folder = args.out
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
    style.save(figure, folder / 'scaling', ('png', *args.formats))


def scaling_page(scaling: Rows) -> str:
    """Tabulate one radius, a column for each seed."""
    chosen = [row for row in scaling if row['epsilon'] == TABLED]
    rows = [
        dict(
            quantity=title,
            **{row['facet']: row[name] / TABLED for row in chosen},
        )
        for name, title in SCALES.items()
    ]
    heads = {key: key for key in rows[0]}
    table = make_table('scaling', '', '', heads, rows, words=1)
    return (
        f'Changes of the logits over the radius, {TABLED:.3g}, of the change '
        f'of the image, and what is said of them.\n\n{to_markdown(table)}\n'
    )


# ------------------------------------------------------- entropy, instability


def save_points(args: argparse.Namespace, points: Rows, label: str) -> None:
    """Draw and write properties of images, and their rank correlations."""
    folder = args.out
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
    style.save(figure, folder / 'images', ('png', *args.formats))
    rows = correlations(points)
    heads = dict(model='model', seed='seed', images='images')
    heads |= dict(entropy='entropy', entropy_p='p')
    heads |= dict(condition_number='condition number', condition_number_p='p')
    counts = dict(seed=str, images=str)
    table = make_table('', '', '', heads, rows, counts, words=1)
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
    ready = ready_cells(study.cells, args.study, progress)
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
    save_points(args, points, label)


def page(cells: Rows, plain: str, args: argparse.Namespace) -> str:
    """Write the table with a few words."""
    rows = seed_means(cells, plain)
    heads = dict(data='data', model='model', seeds='seeds', **COLUMNS)
    heads |= dict(entropy_change='ΔSE, %', frechet_distance_change='ΔFD, %')
    table = make_table('', '', '', heads, rows, dict(seeds=str), words=2)
    bits = 1 / math.log(2)
    return (
        f'Mean ± standard deviation over seeds, {args.samples} test images '
        f'each; attributions under Gaussian changes of {args.std:g} in units '
        f'of normalized images. ΔSE and ΔFD: of the means, against {plain}. '
        f'SE in bits is {bits:.4f} times as large.\n\n{to_markdown(table)}\n'
    )


def seed_means(cells: Rows, plain: str) -> Rows:
    """Condense cells to a line for each combination, ready to print."""
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
    with console.working() as progress:
        run = run_toy if args.command == 'toy' else run_table
        run(args, progress)
    print(f'figures and data are in {args.out}')


if __name__ == '__main__':
    main()
