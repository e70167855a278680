"""Plain lines over any quantity: frequency, size, step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from mmstabvim.visualization import style
from mmstabvim.visualization.curves import Quantity

Rows = Sequence[dict[str, Any]]

_FEW = 10  # points that are marked, and written on the axis


def line_figure(
    rows: Rows,
    series: Sequence[str],
    label: str,
    quantities: Sequence[Quantity],
    horizontal: str,
    log_x: bool = False,
    across: bool = False,
    limits: dict[str, tuple[float, float]] | None = None,
) -> Figure:
    """Quantities over one variable, a line per series.

    A vertical axis is logarithmic where its values span orders of magnitude.

    Args:
        rows (Rows): ``quantity, facet, series, x, value``.
        series (Sequence[str]): Order of the legend.
        label (str): What the series are.
        quantities (Sequence[Quantity]): From top to bottom.
        horizontal (str): Label of the horizontal axes.
        log_x (bool): Whether these are logarithmic. Defaults to False.
        across (bool): Put the quantities beside one another, for rows with
            one facet only. Defaults to False.
        limits (dict[str, tuple[float, float]], optional): Ends of vertical
            axes, by quantity. Defaults to None, for all values.

    Returns:
        Figure: A panel per quantity and facet.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        lines, columns = len(quantities), len(facets)
        if across:
            lines, columns = columns, lines
        figure, grid = style.panels(
            lines,
            columns,
            1.75,
            sharex=True,
            sharey='none' if across else 'row',
        )
        grid = grid.T if across else grid
        for line, quantity in zip(grid, quantities, strict=True):
            for axes, facet in zip(line, facets, strict=True):
                chosen = _choose(rows, quantity.name, facet)
                _draw(axes, chosen, series, log_x)
                if quantity.border is not None:
                    axes.axhline(
                        quantity.border, color=style.GREY, lw=0.8, ls=':'
                    )
                if across or quantity is quantities[-1]:
                    axes.set_xlabel(horizontal)
                if quantity is quantities[0] and not across:
                    axes.set_title(facet)
            _scale(line[0], rows, quantity, limits or {})
        style.add_legend(figure, series, label)
    return figure


def _choose(rows: Rows, quantity: str, facet: str) -> Rows:
    return [
        row
        for row in rows
        if row['quantity'] == quantity and row['facet'] == facet
    ]


def _draw(axes: Axes, rows: Rows, series: Sequence[str], log_x: bool) -> None:
    """One panel."""
    for number, name in enumerate(series):
        chosen = [row for row in rows if row['series'] == name]
        x, value = (
            np.array([row[key] for row in chosen], float)
            for key in ('x', 'value')
        )
        marker = style.MARKERS[number] if len(x) <= _FEW else ''
        look = style.line_style(number)
        axes.plot(x, value, marker=marker, markersize=3.5, **look)
    if log_x:
        axes.set_xscale('log')
    _tick(axes, sorted({row['x'] for row in rows}))
    axes.grid()
    if not rows:
        style.say_empty(axes)


def _tick(axes: Axes, places: Sequence[float]) -> None:
    """Write a few places as they are."""
    if 0 < len(places) <= _FEW:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())


def _scale(
    axes: Axes,
    rows: Rows,
    quantity: Quantity,
    limits: dict[str, tuple[float, float]],
) -> None:
    """Label and scale of a vertical axis; whole powers around zero."""
    axes.set_ylabel(quantity.unit)
    values = [row['value'] for row in rows if row['quantity'] == quantity.name]
    if values:
        style.scale(axes, np.array(values, float))
    if axes.get_yscale() == 'symlog':
        typical = np.median(np.abs(values))
        power = 10.0 ** round(np.log10(typical))
        axes.set_yscale('symlog', linthresh=power)
    if quantity.name in limits:
        axes.set_ylim(*limits[quantity.name])
