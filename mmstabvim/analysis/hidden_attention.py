"""Hidden attention of a Vision Mamba: how much each token takes from others.

For each layer and direction the selective scan is a matrix alpha that acts on
its inputs, ``y = alpha u + D u``; docs/attribution.md has the formula and its
limits. A map is one row of it: what one token takes from each patch.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mmstabvim.apis import tokens
from mmstabvim.layers.mixer_attention import mixer_attention
from mmstabvim.reporting import writing
from mmstabvim.stability.ranges.hidden_attention import attention_rollout
from mmstabvim.visualization.overlay import Panel, overlay_figure

Row = dict[str, Any]
Matrices = dict[str, Tensor]  # by direction, (layers, length, length)

BOTH, ROLLOUT = 'both', 'rollout'

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
_ROLLED = """ Rollout: product over the layers of half that
matrix, scaled to rows of sum 1, and half the identity: a heuristic."""
_FORMULAS = {
    'abs': 'mean of |alpha| over the channels',
    'mean': 'mean of alpha over the channels, in which signs cancel',
    'norm': 'root of the sum of alpha² over the channels',
}
_HEADS = dict(
    layer='layer',
    direction='direction',
    sum='sum',
    own='itself',
    cls='class token',
    distance='distance',
    largest='largest',
)


class Token(NamedTuple):
    """Tokens whose rows of the matrices are averaged."""

    positions: list[int]
    """In the sequence."""
    words: str
    """For people."""
    patch: tuple[int, int] | None = None
    """Row and column, if it is one patch."""


def find_token(which: str | None, layout: tokens.Layout) -> Token:
    """Find the tokens that a user means.

    Args:
        which (str, optional): ``'cls'``, ``'mean'`` of all patches, or
            ``'ROW,COLUMN'`` of a patch, from 0. None for the class token if
            there is one, else the mean.
        layout (Layout): Tokens of the image.

    Returns:
        Token: Their positions.

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
        double = ' (mean of two)' if len(layout.cls_tokens) > 1 else ''
        return Token(layout.cls_tokens, f'the class token{double}')
    if which == 'mean':
        patches = set(range(layout.length)) - set(layout.cls_tokens)
        return Token(sorted(patches), 'the mean patch')
    row, column = _read_patch(which, layout)
    words = f'the patch in row {row}, column {column}'
    return Token([layout.position(row, column)], words, (row, column))


def _read_patch(which: str, layout: tokens.Layout) -> tuple[int, int]:
    """Read row and column of a patch."""
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
    """Count layers from the front.

    Args:
        given (Sequence[int], optional): Layers, negative ones from the back.
            None for all.
        count (int): Layers that there are.

    Returns:
        list[int]: In increasing order.

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


@torch.no_grad()
def find_matrices(
    model: Any,
    image: Tensor,
    how: str = 'abs',
    with_skip: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Matrices:
    """Compute the matrices of all layers while the model runs.

    Args:
        model (nn.Module): With one :class:`mmstabvim.VisionMamba`.
        image (Tensor): (1, channels, height, width), as the model reads it.
        how (str): ``'abs'``, ``'mean'`` or ``'norm'``, over the channels;
            see :func:`mmstabvim.stability.ranges.hidden_attention`. Defaults
            to ``'abs'``.
        with_skip (bool): Add D to the diagonal. Defaults to False.
        tick (Callable): Called after each layer. Defaults to nothing.

    Returns:
        dict[str, Tensor]: By direction, and for their sum ``'both'``:
        (layers, length, length), output token before source token.

    Raises:
        ValueError: If a matrix has a NaN or an infinity.

    Example:
        >>> from mmstabvim.apis import get_model
        >>> model = get_model('configs/vim/vim-nano-p4_1xb64-20e_digits.py')
        >>> find_matrices(model, torch.rand(1, 3, 32, 32))['both'].shape
        torch.Size([3, 65, 65])
    """
    found: dict[str, list[Tensor]] = {}

    def compute(mixer: Any, inputs: tuple[Tensor]) -> None:
        matrices = mixer_attention(mixer, inputs[0], how, with_skip)
        for direction, matrix in zip(mixer.directions, matrices, strict=True):
            name = 'backward' if direction.reverse else 'forward'
            found.setdefault(name, []).append(matrix[0].cpu())
        tick()

    _, backbone = tokens.find_backbone(model)
    with ExitStack() as hooks:
        for block in backbone.layers:
            mixer: Any = block.mixer
            handle = mixer.register_forward_pre_hook(compute)
            hooks.callback(handle.remove)
        model(image)
    matrices = {name: torch.stack(part) for name, part in found.items()}
    matrices[BOTH] = sum(matrices.values(), torch.zeros(()))
    for name, part in matrices.items():
        if not torch.isfinite(part).all():
            raise ValueError(f'{name}: a matrix has a NaN or an infinity')
    return matrices


def map_rows(
    matrix: Tensor, positions: Sequence[int], layout: tokens.Layout, **of: Any
) -> list[Row]:
    """Make a row for each token that is taken from.

    Args:
        matrix (Tensor): (length, length).
        positions (Sequence[int]): Tokens whose rows are averaged.
        layout (Layout): Tokens of the image.
        **of: Put into each row.

    Returns:
        list[dict]: ``token, position, value``, and of a patch ``row,
        column``.
    """
    values = matrix[list(positions)].mean(0)
    rows = [
        dict(of, token='class', position=i, value=float(values[i]))
        for i in layout.cls_tokens
    ]
    grid = layout.on_grid(values[:, None])[..., 0].tolist()
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            at = dict(position=layout.position(row, column), row=row)
            at |= dict(column=column, value=value)
            rows.append(dict(of, token='patch') | at)
    return rows


def summarize(
    matrix: Tensor, positions: Sequence[int], layout: tokens.Layout
) -> Row:
    """Describe a row of a matrix, as the page explains it.

    Args:
        matrix (Tensor): (length, length).
        positions (Sequence[int]): Tokens whose rows are averaged.
        layout (Layout): Tokens of the image.

    Returns:
        dict: ``sum, own, cls, distance``, and ``largest`` in words.
    """
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


@dataclass
class HiddenAttention:
    """Report of the hidden attention of one model.

    Args:
        model (nn.Module): With one :class:`mmstabvim.VisionMamba`.
        token (str, optional): As for :func:`find_token`. Defaults to None.
        how (str): As for :func:`find_matrices`. Defaults to ``'abs'``.
        with_skip (bool): As for :func:`find_matrices`. Defaults to False.
        layers (Sequence[int], optional): To draw. Defaults to None, all.
        rollout (bool): Also follow the matrices through all layers. Defaults
            to False.
        matrices (bool): Also write the matrices. Defaults to True.
    """

    model: Any
    token: str | None = None
    how: str = 'abs'
    with_skip: bool = False
    layers: Sequence[int] | None = None
    rollout: bool = False
    matrices: bool = True

    def write(
        self,
        sample: tokens.Sample,
        path: Path,
        facts: Row,
        tick: Callable[[], None] = lambda: None,
    ) -> str:
        """Write page, numbers, figure and matrices of an image.

        Args:
            sample (Sample): The image.
            path (Path): Of the files, without ending, in an existing folder.
            facts (dict): ``config, checkpoint`` for the page.
            tick (Callable): Called after each layer. Defaults to nothing.

        Returns:
            str: A table for people, in Markdown.

        Raises:
            ValueError: If there is no such token or layer, or a matrix is
                not finite.
        """
        _, backbone = tokens.find_backbone(self.model)
        layout = tokens.layout_of(backbone, sample.image)
        token = find_token(self.token, layout)
        layers = choose_layers(self.layers, backbone.num_layers)
        matrices = find_matrices(
            self.model, sample.image, self.how, self.with_skip, tick
        )
        parts = {
            (str(layer), name): part[layer]
            for layer in layers
            for name, part in matrices.items()
        }
        if self.rollout:
            rolled = attention_rollout(matrices[BOTH][:, None])[0]
            parts[ROLLOUT, BOTH] = rolled
        rows, lines = _collect(parts, token, layout)
        facts = facts | dict(
            name=sample.name,
            token=token.words,
            positions=token.positions,
            class_tokens=layout.cls_tokens,
            grid=[layout.rows, layout.columns],
            formula=_FORMULAS[self.how],
            skip=', D included' if self.with_skip else '',
        )
        table = writing.markdown(lines, _HEADS)
        rolled_words = _ROLLED if self.rollout else ''
        page = PAGE.format(
            **facts, table=table, file=path.name, rollout=rolled_words
        )
        picture = tokens.picture_of(self.model, sample.image)
        figure = draw_maps(rows, picture, layout, token.patch)
        writing.save(path.parent, path.name, page, rows, facts, figure)
        if self.matrices:
            extra = {ROLLOUT: parts[ROLLOUT, BOTH]} if self.rollout else {}
            _save_matrices(path, matrices | extra, layout)
        return table


def _collect(
    parts: dict[tuple[str, str], Tensor], token: Token, layout: tokens.Layout
) -> tuple[list[Row], list[Row]]:
    """Make rows of the maps and lines of the table, in the order drawn."""
    rows: list[Row] = []
    lines: list[Row] = []
    for (layer, name), matrix in parts.items():
        of = dict(layer=layer, direction=name)
        rows += map_rows(matrix, token.positions, layout, **of)
        lines.append(of | summarize(matrix, token.positions, layout))
    return rows, lines


def draw_maps(
    rows: Sequence[Row],
    picture: np.ndarray,
    layout: tokens.Layout,
    mark: tuple[int, int] | None = None,
) -> Figure:
    """Draw the image, then maps over it, three of each layer.

    Args:
        rows (Sequence[dict]): From :func:`map_rows`, with ``layer`` and
            ``direction``.
        picture (ndarray): (height, width, 3), 0 to 1.
        layout (Layout): Tokens of the image.
        mark (tuple[int, int], optional): Row and column of a patch to point
            out. Defaults to None.

    Returns:
        Figure: The figure.
    """
    marks = [
        dict(row, panel=f'{row["layer"]} {row["direction"]}')
        for row in rows
        if row['token'] == 'patch'
    ]
    panels = {'image': Panel('image', picture)}
    for row in marks:
        title = f'layer {row["layer"]}, {row["direction"]}'
        title = ROLLOUT if row['layer'] == ROLLOUT else title
        panels[row['panel']] = Panel(title, picture, mark)
    columns = 3 if len(panels) <= 10 else 6
    return overlay_figure(marks, panels, layout.patches, columns)


def _save_matrices(
    path: Path, matrices: Matrices, layout: tokens.Layout
) -> None:
    """Write the matrices of each direction, and of the rollout."""
    arrays: dict[str, Any] = {
        k: v.numpy() for k, v in matrices.items() if k != BOTH
    }
    np.savez_compressed(
        path.with_suffix('.npz'),
        **arrays,
        class_tokens=np.array(layout.cls_tokens, int),
        grid=np.array([layout.rows, layout.columns]),
    )
