"""Prove ranges of a trained Vision Mamba, and whether half can overflow.

For every layer and direction: how large step size, drive, state and output
can become, and every tensor that autocast keeps in half precision, whatever
the image is and however many tokens it has. Beside it the largest values on
images of the test set or of a folder. docs/ranges.md has the proofs.

Writes ranges.md, .csv, .json, .png, .pdf and .svg.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from mmstabvim.apis import trained
from mmstabvim.engine import launch
from mmstabvim.layers.mixer_ranges import (
    DIRECTED,
    FLOAT32,
    SHARED,
    certify_mixer,
    largest_values,
    trace_mixer,
)
from mmstabvim.reporting import writing
from mmstabvim.visualization import line_figure
from mmstabvim.visualization.curves import Quantity

Row = dict[str, Any]
Values = list[dict[str, float]]

DTYPES = ('float16', 'bfloat16', 'float32')
MAIN = {'delta': 'Δ', 'drive': 'B̄u', 'state': 'h', 'y': 'y'}
LABELS = {
    'delta': r'step size, $\Delta$',
    'drive': r'drive, $\bar{B} u$',
    'state': 'state, $h$',
    'y': 'output of scan, $y$',
}
PARTS = ('shared', 'forward', 'backward')
ORDER = (
    ('shared', SHARED[:3]),
    ('forward', DIRECTED),
    ('backward', DIRECTED),
    ('shared', SHARED[3:]),
)
"""In which a mixer computes its tensors."""

PAGE = """\
# Certified ranges

`{config}`, `{checkpoint}`: the largest absolute values that any image, of any
size, can cause under autocast to {dtype}, proven from the weights; in
parentheses the largest on {images}.

{verdict}

{table}

Worst: the tensor whose bound comes closest to the largest number of the dtype
that it is kept in, or exceeds it. Step size Δ, drive B̄u and state h are kept
in float32, everything else of a mixer in {dtype}. All tensors are in
`ranges.csv`. Of an infinite bound the reason is an eigenvalue whose real part
is not negative. What comes before the first norm (patch embedding) and after
the last block (head) is not covered.

![Bounds and largest values by layer](ranges.png)
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trained.add_options(parser, samples=16)
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        default=DTYPES[0],
        help='of autocast (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    trained.check_samples(parser, args, 0)
    return args


def certify(
    model: nn.Module, dtype: torch.dtype, progress: Progress
) -> dict[str, Values]:
    """Bounds of every block."""
    blocks = trained.find_blocks(model)
    bar = progress.add_task('bounds', total=len(blocks))
    found = {}
    for name, block in blocks.items():
        found[name] = largest_values(
            certify_mixer(block.mixer, block.norm, dtype)
        )
        progress.advance(bar)
    return found


@contextmanager
def watching(model: nn.Module, seen: dict[str, Values]) -> Iterator[None]:
    """Record the largest values of each mixer while the model runs."""

    def record(name: str, mixer: Any, inputs: tuple[Tensor]) -> None:
        new = largest_values(trace_mixer(mixer, inputs[0]))
        old = seen.setdefault(name, new)
        seen[name] = [
            {key: max(a.get(key, 0.0), value) for key, value in b.items()}
            for a, b in zip(old, new, strict=True)
        ]

    handles = [
        block.mixer.register_forward_pre_hook(partial(record, name))
        for name, block in trained.find_blocks(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe(
    args: argparse.Namespace, cfg: Any, model: Any, progress: Progress
) -> tuple[dict[str, Values], int]:
    """Largest values on images, and the number of images."""
    seen: dict[str, Values] = {}
    bar = progress.add_task('images', total=args.samples)
    count = 0
    if args.samples:
        with watching(model, seen):
            for image in trained.load_images(args, cfg, model):
                model(image, mode='tensor')
                count += 1
                progress.advance(bar)
    progress.update(bar, total=count)
    return seen, count


def make_rows(
    bounds: dict[str, Values], seen: dict[str, Values], dtype: torch.dtype
) -> list[Row]:
    """A row for every tensor, in the order of computation."""
    rows = []
    for layer, (name, parts) in enumerate(bounds.items()):
        observed = seen.get(name, [{}] * len(parts))
        given = dict(
            zip(PARTS, zip(parts, observed, strict=True), strict=True)
        )
        for part, tensors in ORDER:
            for tensor in tensors:
                value, largest = (found.get(tensor) for found in given[part])
                kept = torch.float32 if tensor in FLOAT32 else dtype
                limit = torch.finfo(kept).max
                rows.append(
                    dict(
                        layer=layer,
                        name=name,
                        direction=part,
                        tensor=tensor,
                        kept_in=str(kept).removeprefix('torch.'),
                        bound=value,
                        observed=largest,
                        limit=limit,
                        # not so for NaN
                        can_overflow=not value <= limit,
                    )
                )
    return rows


def check(rows: Sequence[Row]) -> None:
    """Compare what was seen with what is proven.

    Raises:
        RuntimeError: If a value exceeds its bound, or is NaN.
    """
    for row in rows:
        seen = row['observed']
        # float32 against exact arithmetic
        if seen is not None and not seen <= row['bound'] * (1 + 1e-5):
            raise RuntimeError(
                f'{row["name"]}, {row["direction"]}, {row["tensor"]}: seen '
                f'{seen:.6g}, which must not exceed {row["bound"]:.6g}'
            )


def verdict(rows: Sequence[Row], dtype: str) -> str:
    """The answer in words."""
    count = len({row['layer'] for row in rows})
    risky = [row for row in rows if row['can_overflow']]
    if not risky:
        return (
            f'**{dtype} cannot overflow** in any of the {count} layers: every '
            'bound is below the largest number.'
        )
    layers = sorted({row['layer'] for row in risky})
    first = risky[0]
    return (
        f'**{dtype} is not certified** in {len(layers)} of {count} layers. '
        f'The first that may overflow is layer {first["layer"]} '
        f'(`{first["name"]}`): `{first["tensor"]}`, {first["direction"]}, '
        f'kept in {first["kept_in"]} (largest number '
        f'{first["limit"]:.6g}), is bounded by '
        f'{writing.number(first["bound"], 4)} only.'
    )


def summarize(rows: Sequence[Row]) -> list[Row]:
    """A row for each layer and direction, for people."""
    found = []
    for layer in sorted({row['layer'] for row in rows}):
        for part in PARTS[1:]:
            own = [
                row
                for row in rows
                if row['layer'] == layer
                and row['direction'] in (part, 'shared')
            ]
            bounds = {row['tensor']: row for row in own}
            worst = max(own, key=lambda row: row['bound'] / row['limit'])
            shares = worst['bound'] / worst['limit']
            line: Row = dict(layer=str(layer), direction=part)
            line |= {tensor: cell(bounds[tensor]) for tensor in MAIN}
            line['worst'] = f'{worst["tensor"]}, {writing.number(shares)}'
            risky = any(row['can_overflow'] for row in own)
            line['overflow'] = 'may' if risky else 'cannot'
            found.append(line)
    return found


def cell(row: Row) -> str:
    """Bound, and the largest value seen."""
    seen = row['observed']
    text = writing.number(row['bound'])
    return text if seen is None else f'{text} ({writing.number(seen)})'


def draw(rows: Sequence[Row], dtype: str) -> Any:
    """Bounds and largest values over the layers."""
    marks = [
        dict(
            quantity=row['tensor'],
            facet='',
            series=f'{kind}, {row["direction"]}',
            x=row['layer'],
            value=value,
        )
        for row in rows
        for kind, value in (('bound', row['bound']), ('seen', row['observed']))
        if row['tensor'] in MAIN
        if value is not None and 0 < value < float('inf')
    ]
    series = [f'{kind}, {p}' for kind in ('bound', 'seen') for p in PARTS[1:]]
    limit = float(torch.finfo(getattr(torch, dtype)).max)
    border = limit if dtype == 'float16' else None
    quantities = [
        Quantity(tensor, label, border) for tensor, label in LABELS.items()
    ]
    return line_figure(marks, series, '', quantities, 'layer')


def main(argv: Sequence[str] | None = None) -> None:
    """Prove, look, compare, write."""
    args = parse_args(argv)
    logging.disable(logging.INFO)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    dtype = getattr(torch, args.dtype)
    with launch.explain_errors(), Progress(console=console) as progress:
        cfg, model = trained.load_model(args)
        bounds = certify(model, dtype, progress)
        seen, count = observe(args, cfg, model, progress)
    rows = make_rows(bounds, seen, dtype)
    check(rows)
    where = 'the test set' if args.images is None else str(args.images)
    facts = dict(
        config=args.config,
        checkpoint=args.checkpoint,
        dtype=args.dtype,
        images=f'{count} images of {where}',
        verdict=verdict(rows, args.dtype),
    )
    columns = dict(layer='layer', direction='direction')
    columns |= {tensor: f'{symbol}' for tensor, symbol in MAIN.items()}
    columns |= dict(worst='worst, of its limit', overflow='overflow')
    table = writing.markdown(summarize(rows), columns)
    folder = trained.out_folder(args, 'ranges')
    page = PAGE.format(**facts, table=table)
    figure = draw(rows, args.dtype)
    writing.save(folder, 'ranges', page, rows, facts, figure)
    print(table)
    print(facts['verdict'].replace('**', ''))
    print(f'Written: {folder / "ranges.md"}')


if __name__ == '__main__':
    main(sys.argv[1:])
