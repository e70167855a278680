"""Show the hidden attention of a Vision Mamba: what tokens take from others.

For each layer and direction the selective scan is a matrix alpha that acts on
its inputs, ``y = alpha u + D u``. Drawn is one row of it: from which patches
a token, by default the class token, takes how much. That concerns the inputs
of the scan inside one layer, not pixels. docs/attribution.md has the formula
and what the maps do not mean.

Writes for each image image_0.md, .csv, .json, .png, .pdf, .svg, and the
matrices as .npz.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from mmstabvim.apis import tokens, trained
from mmstabvim.engine import launch
from mmstabvim.layers.mixer_attention import mixer_attention
from mmstabvim.models import VisionMamba
from mmstabvim.reporting import writing
from mmstabvim.stability.ranges.hidden_attention import (
    AGGREGATIONS,
    attention_rollout,
)
from mmstabvim.visualization.overlay import Panel, overlay_figure

Row = dict[str, Any]
Matrices = dict[str, Tensor]  # by direction, (layers, length, length)

BOTH, ROLLOUT = 'both', 'rollout'
FORMULAS = {
    'abs': 'mean of |alpha| over the channels',
    'mean': 'mean of alpha over the channels, in which signs cancel',
    'norm': 'root of the sum of alpha² over the channels',
}

PAGE = """\
# Hidden attention

`{config}`, `{checkpoint}`, image `{name}`: what {token} takes from each
patch in the scans of each layer, {formula}{skip}.

{table}

Sum: of the row of the matrix, class tokens included. Itself, class token:
shares of the sum of absolute values. Distance: mean distance of the tokens
taken from, along the sequence. Largest: the patch with the largest absolute
value, row and column from 0. Both: the sum of the two matrices; each
direction has inputs of its own.{rollout}

**This is about the inputs of the scan inside one layer, not about pixels.**
Step sizes, B and C count as given, though they depend on the tokens too.
Convolution (which mixes neighbours) comes before, gate and output projection
after. It says nothing about a class.

![Maps by layer and direction]({file}.png)
"""
ROLLED = """ Rollout: product over the layers of half that
matrix, scaled to rows of sum 1, and half the identity: a heuristic."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trained.add_options(parser, samples=1)
    add = parser.add_argument
    add(
        '--token',
        metavar='WHICH',
        help="whose row: 'cls', 'mean' of all patches, or ROW,COLUMN of a "
        'patch (default: cls if there is one, else mean)',
    )
    add(
        '--how',
        choices=AGGREGATIONS,
        default='abs',
        help='over the channels: mean of absolute values, mean, or root of '
        'the sum of squares (default: %(default)s)',
    )
    add('--layers', type=int, nargs='+', help='to draw (default: all)')
    add('--with-skip', action='store_true', help='add D to the diagonal')
    add('--rollout', action='store_true', help='also over all layers')
    add('--no-matrices', action='store_true', help='do not write .npz files')
    args = parser.parse_args(argv)
    trained.check_samples(parser, args, 1)
    if args.rollout and args.how == 'mean':
        parser.error('--rollout needs values >= 0: --how abs or norm')
    return args


# ----------------------------------------------------------------- the token


def token_positions(
    which: str | None, layout: tokens.Layout
) -> tuple[list[int], str, tuple[int, int] | None]:
    """Whose rows are averaged, in words, and the patch if it is one.

    Raises:
        ValueError: If there is no such token.
    """
    if which is None:
        which = 'cls' if layout.cls_tokens else 'mean'
    if which == 'cls':
        if not layout.cls_tokens:
            raise ValueError(
                "--token cls: the model has no class token: choose 'mean' or "
                'ROW,COLUMN of a patch'
            )
        double = len(layout.cls_tokens) > 1
        words = (
            'the class token (mean of two)' if double else 'the class token'
        )
        return layout.cls_tokens, words, None
    if which == 'mean':
        patches = set(range(layout.length)) - set(layout.cls_tokens)
        return sorted(patches), 'the mean patch', None
    row, column = _patch(which, layout)
    words = f'the patch in row {row}, column {column}'
    return [layout.position(row, column)], words, (row, column)


def _patch(which: str, layout: tokens.Layout) -> tuple[int, int]:
    try:
        row, column = (int(part) for part in which.split(','))
        inside = 0 <= row < layout.rows and 0 <= column < layout.columns
    except ValueError:
        inside = False
    if not inside:
        raise ValueError(
            "--token must be 'cls', 'mean' or ROW,COLUMN with rows from 0 to "
            f'{layout.rows - 1} and columns from 0 to {layout.columns - 1}, '
            f'got {which!r}'
        )
    return row, column


def choose_layers(given: Sequence[int] | None, count: int) -> list[int]:
    """Numbers of layers from the front.

    Raises:
        ValueError: If there is no such layer.
    """
    chosen = range(count) if given is None else given
    wrong = [i for i in chosen if not -count <= i < count]
    if wrong:
        raise ValueError(
            f'--layers must be from {-count} to {count - 1}, got {wrong}'
        )
    return sorted({i % count for i in chosen})


# --------------------------------------------------------------- the matrices


@contextmanager
def watching(
    backbone: VisionMamba,
    found: dict[str, list[Tensor]],
    args: argparse.Namespace,
    tick: Callable[[], None],
) -> Iterator[None]:
    """Compute the matrices of each mixer while the model runs."""

    def compute(mixer: Any, inputs: tuple[Tensor]) -> None:
        matrices = mixer_attention(mixer, inputs[0], args.how, args.with_skip)
        for direction, matrix in zip(mixer.directions, matrices, strict=True):
            name = 'backward' if direction.reverse else 'forward'
            found.setdefault(name, []).append(matrix[0].cpu())
        tick()

    handles = [
        block.mixer.register_forward_pre_hook(compute)
        for block in backbone.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def find_matrices(
    model: Any,
    backbone: VisionMamba,
    image: Tensor,
    args: argparse.Namespace,
    tick: Callable[[], None] = lambda: None,
) -> Matrices:
    """Matrices of all layers, by direction, and the sum of both."""
    found: dict[str, list[Tensor]] = {}
    with watching(backbone, found, args, tick):
        model(image, mode='tensor')
    matrices = {name: torch.stack(part) for name, part in found.items()}
    matrices[BOTH] = sum(matrices.values(), torch.zeros(()))
    for name, part in matrices.items():
        if not torch.isfinite(part).all():
            raise ValueError(f'{name}: a matrix has a NaN or an infinity')
    return matrices


# -------------------------------------------------------------------- results


def map_rows(
    matrix: Tensor, positions: Sequence[int], layout: tokens.Layout, **of: Any
) -> list[Row]:
    """A row for each token that is taken from."""
    values = matrix[list(positions)].mean(0)
    grid = layout.on_grid(values[:, None])[..., 0].tolist()
    rows = [
        dict(of, token='class', position=i, value=float(values[i]))
        for i in layout.cls_tokens
    ]
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            at = layout.position(row, column)
            place = dict(row=row, column=column)
            rows.append(dict(of, token='patch', position=at) | place)
            rows[-1]['value'] = value
    return rows


def summarize(
    matrix: Tensor, positions: Sequence[int], layout: tokens.Layout
) -> Row:
    """One line for people."""
    rows = matrix[list(positions)]
    sizes = rows.abs()
    total = sizes.sum(-1, keepdim=True)
    share = sizes / torch.where(total == 0, 1.0, total)
    distance = torch.arange(layout.length) - torch.tensor(positions)[:, None]
    own = share[torch.arange(len(positions)), list(positions)]
    grid = layout.on_grid(rows.mean(0)[:, None])[..., 0]
    at = divmod(int(grid.abs().argmax()), layout.columns)
    return dict(
        sum=float(rows.sum(-1).mean()),
        own=float(own.mean()),
        cls=float(share[:, layout.cls_tokens].sum(-1).mean()),
        distance=float((share * distance.abs()).sum(-1).mean()),
        largest=f'{writing.number(float(grid[at]))} at {at[0]}, {at[1]}',
    )


HEADS = dict(
    layer='layer',
    direction='direction',
    sum='sum',
    own='itself',
    cls='class token',
    distance='distance',
    largest='largest',
)


def collect(
    matrices: Matrices,
    layers: Sequence[int],
    positions: Sequence[int],
    layout: tokens.Layout,
    rolled: Tensor | None,
) -> tuple[list[Row], list[Row]]:
    """Rows of the maps and lines of the table, in the order drawn."""
    parts = [
        (str(layer), name, part[layer])
        for layer in layers
        for name, part in matrices.items()
    ]
    if rolled is not None:
        parts.append((ROLLOUT, BOTH, rolled))
    rows: list[Row] = []
    lines: list[Row] = []
    for layer, name, matrix in parts:
        of = dict(layer=layer, direction=name)
        rows += map_rows(matrix, positions, layout, **of)
        lines.append(of | summarize(matrix, positions, layout))
    return rows, lines


def draw(
    rows: Sequence[Row],
    picture: np.ndarray,
    layout: tokens.Layout,
    mark: tuple[int, int] | None,
) -> Any:
    """Maps over the image: three of each layer, at last the image."""
    marks = [
        dict(row, panel=f'{row["layer"]} {row["direction"]}')
        for row in rows
        if row['token'] == 'patch'
    ]
    panels = {}
    for row in marks:
        rolled = row['layer'] == ROLLOUT
        title = f'layer {row["layer"]}, {row["direction"]}'
        title = ROLLOUT if rolled else title
        panels[row['panel']] = Panel(title, picture, mark)
    columns = 3 if len(panels) <= 9 else 6
    panels['image'] = Panel('image', picture)
    return overlay_figure(marks, panels, layout.patches, columns)


def write(
    args: argparse.Namespace,
    model: Any,
    backbone: VisionMamba,
    number: int,
    sample: tokens.Sample,
    matrices: Matrices,
) -> str:
    """All files of one image; returns the table."""
    layout = tokens.layout_of(backbone, sample.image)
    positions, words, mark = token_positions(args.token, layout)
    layers = choose_layers(args.layers, len(matrices[BOTH]))
    rolled = None
    if args.rollout:
        rolled = attention_rollout(matrices[BOTH][:, None])[0]
    rows, lines = collect(matrices, layers, positions, layout, rolled)
    folder, file = (
        trained.out_folder(args, 'hidden_attention'),
        f'image_{number}',
    )
    facts = dict(
        config=args.config,
        checkpoint=args.checkpoint,
        name=sample.name,
        token=words,
        positions=positions,
        class_tokens=layout.cls_tokens,
        grid=[layout.rows, layout.columns],
        formula=FORMULAS[args.how],
        skip=', D included' if args.with_skip else '',
    )
    table = writing.markdown(lines, HEADS)
    page = PAGE.format(
        **facts, table=table, file=file, rollout=ROLLED if args.rollout else ''
    )
    picture = tokens.picture_of(model, sample.image)
    figure = draw(rows, picture, layout, mark)
    writing.save(folder, file, page, rows, facts, figure)
    if not args.no_matrices:
        extra = {} if rolled is None else {ROLLOUT: rolled}
        arrays = {k: v.numpy() for k, v in (matrices | extra).items()}
        del arrays[BOTH]  # the sum of the other two
        np.savez_compressed(
            folder / f'{file}.npz',
            **arrays,
            class_tokens=np.array(layout.cls_tokens, int),
            grid=np.array([layout.rows, layout.columns]),
        )
    return f'{table}\nWritten: {folder / file}.md'


def main(argv: Sequence[str] | None = None) -> None:
    """Look at images, write."""
    args = parse_args(argv)
    logging.disable(logging.INFO)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    reports = []
    with launch.explain_errors(), Progress(console=console) as progress:
        cfg, model = trained.load_model(args)
        _, backbone = tokens.find_backbone(model)
        total = args.samples * backbone.num_layers
        bar = progress.add_task('layers', total=total)
        for number, sample in enumerate(tokens.named_images(args, cfg, model)):
            layout = tokens.layout_of(backbone, sample.image)
            token_positions(args.token, layout)  # before the work
            choose_layers(args.layers, backbone.num_layers)
            matrices = find_matrices(
                model,
                backbone,
                sample.image,
                args,
                lambda: progress.advance(bar),
            )
            reports.append(
                write(args, model, backbone, number, sample, matrices)
            )
        progress.update(bar, total=len(reports) * backbone.num_layers)
    print('\n\n'.join(reports))


if __name__ == '__main__':
    main(sys.argv[1:])
