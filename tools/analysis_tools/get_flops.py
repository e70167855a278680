"""Count the floating-point operations of a classifier or segmentor.

One multiply-add is two operations, as for PyTorch's counter; papers often
print multiply-adds and call them FLOPs, so both are shown. For images of
``height`` x ``width`` a Vision Mamba has ``L`` tokens (patches and class
tokens); with D channels, E = expand * D, state size N, rank R of the step
size and a convolution of K tokens a block of two directions takes::

    in_proj      2 L D (2 E)
    conv1d       2 directions * 2 L E K
    x_proj       2 directions * 2 L E (R + 2 N)
    dt_proj      2 directions * 2 L R E
    scan         2 directions * L E (7 N + 6)
    out_proj     2 L E D

beside the patch embedding, 2 * patches * (3 * patch_size**2) D, and the head,
2 D * classes. The scan per token, channel and state: delta A, exp,
(delta u) B, multiply and add into the state, multiply and add into the
output, 7 (complex states: 28); per token and channel: softplus 3, delta u 1,
D u 2. It is linear in L; an attention layer is quadratic.

As usual, what is done once per value is not counted: norms, activations,
gates, residuals, position embedding, resizing; nor the eigenvectors of dense
state matrices, which are computed once per batch. A segmentor's auxiliary
heads are left out, as it does not need them to predict.

Prints a table by parts of the model, layers of one kind together; with --out
writes flops.md, .csv, .json, .png, .pdf and .svg.
"""

import argparse
import logging
import sys
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmengine
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils import flop_counter

from mmstabvim.engine import launch
from mmstabvim.layers import MambaMixer, SelectiveSSM
from mmstabvim.reporting import style, writing
from mmstabvim.reporting.tables import Table as Page
from mmstabvim.reporting.tables import to_markdown

Row = dict[str, Any]
Counts = dict[str, dict[str, int]]

SCANS = ('selective_scan', 'selective_scan_triton')
OPERATORS = {
    'mm': 'matrix product',
    'addmm': 'matrix product',
    'bmm': 'matrix products',
    'baddbmm': 'matrix products',
    'convolution': 'convolution',
    'causal_conv1d': 'causal convolution, both directions',
    'selective_scan': 'scan, both directions',
    'selective_scan_triton': 'scan, both directions',
}
"""Names for people; others are shown as PyTorch calls them."""

# PyTorch counts every fused attention but that of the CPU
_ATTENTION = '_scaled_dot_product_flash_attention_for_cpu'
for _ending, _formula in {
    '': flop_counter.sdpa_flop,
    '_backward': flop_counter.sdpa_backward_flop,
}.items():
    _operator = getattr(torch.ops.aten, _ATTENTION + _ending)
    flop_counter.flop_registry.setdefault(_operator, _formula)

PAGE = """\
# Floating-point operations

`{config}`, one image of {height} x {width} pixels: \
{gflop:.4g} GFLOP, which are {gmac:.4g} G multiply-adds; \
{parameters:,} parameters.

{table}

Not counted: what is done once per value (norms, activations, gates,
residuals, position embedding, resizing), eigenvectors, auxiliary heads.

![Operations by part](flops.png)
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', help='path of the config')
    add(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the image, or one number for both '
        "(default: the config's)",
    )
    add(
        '--depth',
        type=int,
        metavar='N',
        help='add up parts whose names agree in their first N words '
        '(default: all words)',
    )
    add('--device', default='cpu', help='where the model runs')
    add('--seed', type=int, default=0, help='of the weights and the image')
    add('--out', type=Path, metavar='DIR', help='folder for the results')
    launch.add_cfg_options(parser)
    args = parser.parse_args(argv)
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(
            f'--shape must be one or two positive numbers, got {args.shape}'
        )
    if args.depth is not None and args.depth < 1:
        parser.error(f'--depth must be at least 1, got {args.depth}')
    if args.device != 'cpu' and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: there is no GPU')
    return args


# -------------------------------------------------------------------- model


def build_model(args: argparse.Namespace) -> tuple[Config, Any]:
    """The model of the config, with random weights."""
    launch.check_file(args.config, 'config file')
    cfg = launch.read_settings(args.config, args.cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'model' not in cfg:
        raise ValueError(f'the config must have a model, got {sorted(cfg)}')
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(args.seed)
    model = MODELS.build(cfg.model)
    if torch.device(args.device).type == 'cpu':
        model = revert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, SelectiveSSM):
            module.backend = 'auto'  # plain PyTorch would hide the scan
    return cfg, model.to(args.device).eval()


def image_shape(args: argparse.Namespace, cfg: Config) -> tuple[int, int]:
    """Height and width: as asked for, else as the config has them."""
    if args.shape:
        return args.shape[0], args.shape[-1]
    preprocessor = cfg.model.get('data_preprocessor') or {}
    for size in (
        preprocessor.get('size'),
        cfg.model.get('backbone', {}).get('img_size'),
        cfg.get('crop_size'),
    ):
        if isinstance(size, int):
            return size, size
        if isinstance(size, Sequence) and len(size) == 2:
            return size[0], size[1]
    return 224, 224


# ------------------------------------------------------------------ counting


@contextmanager
def watching(model: nn.Module, progress: Progress) -> Iterator[None]:
    """Show how many of the modules without parts have run."""
    leaves = [m for m in model.modules() if not next(m.children(), None)]
    bar = progress.add_task('modules', total=len(leaves))
    handles = [
        module.register_forward_hook(lambda *_: progress.advance(bar))
        for module in leaves
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        progress.update(bar, completed=len(leaves))


@torch.no_grad()
def count(model: Any, image: Tensor) -> Counts:
    """FLOPs by module, without those of its parts, and by operator.

    Args:
        model (nn.Module): A classifier or segmentor in evaluation mode.
        image (Tensor): (1, channels, height, width).

    Returns:
        dict[str, dict[str, int]]: By the name of the module, ``''`` for what
        the model does outside of its parts.

    Raises:
        ValueError: If a mixer runs without a scan that can be counted.
    """
    with flop_counter.FlopCounterMode(display=False) as counter:
        model(image, mode='tensor')
    root = type(model).__name__
    found = {
        name.removeprefix(root).removeprefix('.'): {
            str(operator).split('.')[-1]: number
            for operator, number in counts.items()
        }
        for name, counts in counter.get_flop_counts().items()
        if name != 'Global'
    }
    _check_scans(model, found)
    return _own(found)


def _check_scans(model: nn.Module, found: Counts) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MambaMixer) and not (
            found.get(name, {}).keys() & set(SCANS)
        ):
            raise ValueError(
                f'{name} must run a scan, got only '
                f'{sorted(found.get(name, {}))}: a dense state matrix '
                'without eigenvectors needs matrix exponentials, which '
                'cannot be counted'
            )


def _own(found: Counts) -> Counts:
    """Without what belongs to parts: counts hold those of all below."""
    own = {name: dict(counts) for name, counts in found.items()}
    for name, counts in found.items():
        if name:
            above = _around(name, found)
            for operator, number in counts.items():
                own[above][operator] -= number
    return {
        name: {operator: n for operator, n in counts.items() if n}
        for name, counts in own.items()
    }


def _around(name: str, known: Container[str]) -> str:
    """Nearest of some modules around one: lists of modules are not called."""
    above = name.rpartition('.')[0]
    while above and above not in known:
        above = above.rpartition('.')[0]
    return above


def kind_of(name: str, depth: int | None = None) -> str:
    """Name of a module with its layers' numbers left open."""
    words = ['*' if word.isdigit() else word for word in name.split('.')]
    return '.'.join(words[:depth]) or '(model)'


def parameters_of(model: nn.Module, counts: Counts) -> dict[str, int]:
    """Parameters by the module that uses them.

    Those of a module that is never called, as the directions of a mixer are,
    go to the one around it. A parameter with two names counts once.
    """
    called = {name for name, own in counts.items() if own}
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        place = _around(name, called) or name.rpartition('.')[0]
        found[place] = found.get(place, 0) + parameter.numel()
    return found


def make_rows(
    model: nn.Module, counts: Counts, depth: int | None = None
) -> list[Row]:
    """A row for each kind of module and operator.

    Args:
        model (nn.Module): The model.
        counts (dict[str, dict[str, int]]): Of :func:`count`.
        depth (int, optional): As ``--depth``. Defaults to None.

    Returns:
        list[dict]: ``part, operator, modules, parameters, flops, share``, in
        the order of the model. Parameters stand in a part's first row.
    """
    sizes = parameters_of(model, counts)
    order = [name for name, _ in model.named_modules()]
    rows: dict[tuple[str, str], Row] = {}
    for name in order:
        if not counts.get(name) and name not in sizes:
            continue
        kind = kind_of(name, depth)
        own = counts.get(name) or {'': 0}
        for i, (operator, number) in enumerate(own.items()):
            title = OPERATORS.get(operator, operator)
            row = rows.setdefault(
                (kind, title),
                dict(part=kind, operator=title, modules=0)
                | dict(parameters=0, flops=0),
            )
            row['modules'] += 1
            row['flops'] += number
            row['parameters'] += sizes.get(name, 0) if i == 0 else 0
    found = sorted(rows.values(), key=lambda r: _first(rows, r['part']))
    total = sum(row['flops'] for row in found)
    return [dict(row, share=row['flops'] / (total or 1)) for row in found]


def _first(rows: dict[tuple[str, str], Row], part: str) -> int:
    """Place at which a part appears first."""
    return [key[0] for key in rows].index(part)


# ------------------------------------------------------------------- results


def text_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows for people, with the sum."""
    total = dict(part='total', operator='', modules=None)
    total |= {
        name: sum(row[name] for row in rows)
        for name in ('parameters', 'flops', 'share')
    }
    return [
        dict(
            part=row['part'],
            operator=row['operator'],
            modules='' if row['modules'] is None else str(row['modules']),
            parameters=f'{row["parameters"]:,}' if row['parameters'] else '',
            gflop=f'{row["flops"] / 1e9:.4g}',
            gmac=f'{row["flops"] / 2e9:.4g}',
            share=f'{100 * row["share"]:.1f}',
        )
        for row in [*rows, total]
    ]


COLUMNS = dict(
    part='part',
    operator='operator',
    modules='modules',
    parameters='parameters',
    gflop='GFLOP',
    gmac='G multiply-adds',
    share='%',
)
WORDS = ('part', 'operator')


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the table."""
    table = Table()
    for key, head in COLUMNS.items():
        side = 'left' if key in WORDS else 'right'
        table.add_column(head, justify=side, overflow='fold')
    lines = text_rows(rows)
    for line in lines:
        table.add_row(*line.values(), end_section=line is lines[-2])
    console.print(table, markup=False)


def draw(rows: Sequence[Row]) -> Figure:
    """Shares of the parts, from top to bottom."""
    shown = [row for row in rows if row['flops']][::-1]
    with style.figure_style():
        figure, grid = style.panels(1, 1, 0.6 + 0.22 * len(shown))
        axes = grid[0, 0]
        names = [f'{row["part"]}\n{row["operator"]}' for row in shown]
        values = [row['flops'] / 1e9 for row in shown]
        bars = axes.barh(range(len(shown)), values, color=style.COLORS[2])
        axes.set_yticks(range(len(shown)), names, fontsize=5.5)
        shares = [f' {100 * row["share"]:.1f} %' for row in shown]
        axes.bar_label(bars, shares, fontsize=6)
        axes.set_xlabel('GFLOP')
        axes.margins(x=0.15)
    return figure


def write(
    args: argparse.Namespace, facts: Row, rows: Sequence[Row], folder: Path
) -> None:
    """All files of the results."""
    mmengine.mkdir_or_exist(folder)
    shown = text_rows(rows)
    lines = [[*line.values()] for line in shown]
    sides = ''.join('l' if k in WORDS else 'r' for k in COLUMNS)
    heads = [*COLUMNS.values()]
    table = to_markdown(Page('', '', '', heads, lines, [], sides))
    page = PAGE.format(**facts, table=table)
    writing.save(folder, 'flops', page, rows, facts, draw(rows))


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print, write."""
    args = parse_args(argv)
    logging.disable(logging.INFO)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    with launch.clear_errors(), Progress(console=errors) as progress:
        cfg, model = build_model(args)
        height, width = image_shape(args, cfg)
        image = torch.randn(1, 3, height, width).to(args.device)
        with watching(model, progress):
            counts = count(model, image)
    rows = make_rows(model, counts, args.depth)
    flops = sum(row['flops'] for row in rows)
    facts = dict(
        config=args.config,
        height=height,
        width=width,
        flops=flops,
        gflop=flops / 1e9,
        gmac=flops / 2e9,
        parameters=sum(row['parameters'] for row in rows),
    )
    show(Console(width=None if sys.stdout.isatty() else 120), rows)
    print(
        f'{height} x {width} pixels: {facts["gflop"]:.4g} '
        f'GFLOP = {facts["gmac"]:.4g} G multiply-adds, '
        f'{facts["parameters"]:,} parameters'
    )
    if args.out:
        write(args, facts, rows, args.out)
        print(f'Written: {args.out / "flops.md"}')


if __name__ == '__main__':
    main()
