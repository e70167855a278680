"""Values of an image's patches, laid over the image."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mmstabvim.reporting import style

Rows = Sequence[dict[str, Any]]


class Patches(NamedTuple):
    """Patches of an image, the first one at its upper left corner."""

    size: int
    """Side, pixels."""
    stride: int
    """Distance of two, pixels."""

    def cell(self, row: int, column: int) -> tuple[float, float]:
        """Left and upper edge, pixels, of the square that stands for one.

        It is around the centre of the patch, and ``stride`` wide, so that
        patches that overlap stay apart.
        """
        shift = (self.size - self.stride) / 2
        return column * self.stride + shift, row * self.stride + shift


class Panel(NamedTuple):
    """One image of a figure."""

    title: str
    image: np.ndarray
    """(height, width, 3), 0 to 1."""
    mark: tuple[int, int] | None = None
    """Row and column of a patch to point out."""


def overlay_figure(
    rows: Rows, panels: Mapping[str, Panel], patches: Patches, columns: int
) -> Figure:
    """Draw images, and on them a square of colour for each patch.

    Each panel has its own scale, from 0 to its largest absolute value, which
    stands below it; the larger a value, the less of the image shines through.
    With a value below 0 in any panel the colours say the sign.

    Args:
        rows (Rows): ``panel, row, column, value``.
        panels (Mapping[str, Panel]): In their order; one without rows is the
            image alone.
        patches (Patches): Of all images.
        columns (int): Panels beside one another.

    Returns:
        Figure: The figure.
    """
    signed = any(row['value'] < 0 for row in rows)
    with style.figure_style():
        lines = -(-len(panels) // columns)
        tallest = max(
            p.image.shape[0] / p.image.shape[1] for p in panels.values()
        )
        width = (style.WIDTH if columns > 1 else 0.72 * style.WIDTH) / columns
        figure, grid = style.panels(
            lines, columns, max(0.4, tallest * width + 0.2)
        )
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (name, panel) in zip(
            grid.flat, panels.items(), strict=False
        ):
            chosen = [row for row in rows if row['panel'] == name]
            _draw(axes, chosen, panel, patches, signed)
    return figure


def _draw(
    axes: Axes, rows: Rows, panel: Panel, patches: Patches, signed: bool
) -> None:
    """One panel."""
    height, width = panel.image.shape[:2]
    axes.imshow(panel.image, extent=(0, width, height, 0))
    axes.set_title(panel.title, fontsize=6.5, pad=2)
    if rows:
        _draw_values(axes, rows, patches, signed)
    if panel.mark is not None:
        corner = patches.cell(*panel.mark)
        side = patches.stride
        for color, line in (('#FFFFFF', 2.0), ('#000000', 0.8)):
            frame = Rectangle(corner, side, side, fill=False)
            frame.set(edgecolor=color, linewidth=line)
            axes.add_patch(frame)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _draw_values(
    axes: Axes, rows: Rows, patches: Patches, signed: bool
) -> None:
    shape = [1 + max(row[key] for row in rows) for key in ('row', 'column')]
    values = np.full(shape, np.nan)
    for row in rows:
        values[row['row'], row['column']] = row['value']
    largest = float(np.nanmax(np.abs(values)))
    scale = largest or 1.0
    left, top = patches.cell(0, 0)
    right, bottom = patches.cell(shape[0], shape[1])
    axes.imshow(
        values,
        cmap='RdBu_r' if signed else 'inferno',
        vmin=-scale if signed else 0,
        vmax=scale,
        alpha=0.25 + 0.55 * np.nan_to_num(np.abs(values)) / scale,
        extent=(left, right, bottom, top),
        interpolation='nearest',
    )
    axes.text(
        0.5,
        -0.02,
        f'{"±" if signed else "0 to "}{largest:.2g}',
        transform=axes.transAxes,
        ha='center',
        va='top',
        fontsize=5.5,
        color=style.GREY,
    )
