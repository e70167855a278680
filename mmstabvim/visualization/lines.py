"""Lines and marks over any quantity: frequency, size, layer, image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from mmstabvim.reporting import style
from mmstabvim.reporting.style import Rows, columns, select
from mmstabvim.visualization.curves import Quantity, draw_lines

_FEW = 12  # points that are marked
_TICKED = 10  # places that are written on the axis
_SPREAD = 0.5  # of the series around the place of a name


def line_figure(
    rows: Rows,
    series: Sequence[str],
    label: str,
    quantities: Sequence[Quantity],
    horizontal: str,
    log_x: bool = False,
    across: bool = False,
    limits: Mapping[str, tuple[float, float]] | None = None,
    border: str = '',
) -> Figure:
    """Draw quantities over one variable, a line per series.

    A vertical axis is logarithmic where its values span orders of magnitude.

    Args:
        rows (Rows): ``quantity, facet, series, x, value``.
        series (Sequence[str]): Order of the legend.
        label (str): Meaning of the series.
        quantities (Sequence[Quantity]): From top to bottom.
        horizontal (str): Label of the horizontal axes.
        log_x (bool): Make these logarithmic. Defaults to False.
        across (bool): Put the quantities beside one another, for rows with
            one facet only. Defaults to False.
        limits (Mapping[str, tuple[float, float]], optional): Ends of vertical
            axes, by quantity. Defaults to None, for all values.
        border (str): Name of the quantities' borders in the legend. Defaults
            to none.

    Returns:
        Figure: A panel per quantity and facet.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        shape = len(quantities), len(facets)
        share = 'none' if across else 'row'
        figure, grid = style.panels(
            *(shape[::-1] if across else shape),
            1.75,
            sharex=True,
            sharey=share,
        )
        grid = grid.T if across else grid
        for line, quantity in zip(grid, quantities, strict=True):
            own = select(rows, quantity=quantity.name)
            for axes, facet in zip(line, facets, strict=True):
                chosen = select(own, facet=facet)
                draw_lines(axes, chosen, series, few=_FEW)
                axes.set_xscale('log' if log_x else 'linear')
                _tick(axes, sorted({row['x'] for row in chosen}))
                style.draw_border(axes, quantity.border, ':')
                if across or quantity is quantities[-1]:
                    axes.set_xlabel(horizontal)
                if quantity is quantities[0] and not across:
                    axes.set_title(facet)
            _scale(line[0], own, quantity, limits or {})
        marked = any(
            0 < len(line.get_xdata()) <= _FEW for line in grid[0, 0].lines
        )
        style.add_legend(figure, series, label, marked, border)
    return figure


def _tick(axes: Axes, places: Sequence[float]) -> None:
    """Write a few places as they are."""
    if 0 < len(places) <= _TICKED:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())


def _scale(
    axes: Axes,
    rows: Rows,
    quantity: Quantity,
    limits: Mapping[str, tuple[float, float]],
) -> None:
    """Label and scale a vertical axis; whole powers around zero."""
    axes.set_ylabel(quantity.unit)
    (values,) = columns(rows, 'value')
    if len(values):
        # the border takes its part of the axis
        seen = [*values, quantity.border] if quantity.border else values
        style.scale(axes, np.array(seen))
    if axes.get_yscale() == 'symlog':
        power = 10.0 ** round(np.log10(np.median(np.abs(values))))
        axes.set_yscale('symlog', linthresh=power)
    if quantity.name in limits:
        axes.set_ylim(*limits[quantity.name])


def robustness_figure(
    modes: Rows,
    others: Rows,
    series: Sequence[str],
    label: str,
    quantities: Sequence[Quantity],
) -> Figure:
    """Draw the response to perturbations: modes by frequency, and others.

    Args:
        modes (Rows): ``quantity, facet, series, x, mean, low, high``; ``low``
            and ``high`` bound the band.
        others (Rows): The same with ``name`` in place of ``x``.
        series (Sequence[str]): Order of the legend.
        label (str): Meaning of the series.
        quantities (Sequence[Quantity]): From top to bottom.

    Returns:
        Figure: For each quantity and facet a wide panel and a narrow one
        with a common vertical axis.
    """
    with style.figure_style():
        facets = style.unique([*modes, *others], 'facet')
        figure, grid = style.panels(
            len(quantities),
            2 * len(facets),
            1.6,
            sharex='col',
            sharey='row',
            width_ratios=[2.4, 1] * len(facets),
        )
        for line, quantity in zip(grid, quantities, strict=True):
            for i, facet in enumerate(facets):
                wide, narrow = line[2 * i : 2 * i + 2]
                wanted = dict(quantity=quantity.name, facet=facet)
                chosen = select(modes, **wanted)
                draw_lines(wide, chosen, series, 'x', 'mean', True, _FEW)
                _draw_others(narrow, select(others, **wanted), series)
                wide.set_title(facet if quantity is quantities[0] else '')
                if quantity is quantities[-1]:
                    wide.set_xlabel('frequency (cycles per token)')
            line[0].set_ylabel(quantity.unit)
        style.add_legend(figure, series, label, markers=True)
    return figure


def _draw_others(axes: Axes, rows: Rows, series: Sequence[str]) -> None:
    """Draw points with bars, side by side above each name."""
    names = style.unique(rows, 'name')
    for number, name in enumerate(series):
        chosen = select(rows, series=name)
        mean, low, high = columns(chosen, 'mean', 'low', 'high')
        shift = _SPREAD * ((number + 0.5) / len(series) - 0.5)
        axes.errorbar(
            [names.index(row['name']) + shift for row in chosen],
            mean,
            yerr=[mean - low, high - mean],
            fmt=style.marker(number),
            color=style.line_style(number)['color'],
            markersize=3,
            elinewidth=0.8,
        )
    axes.set_xticks(range(len(names)), names, rotation=60, ha='right')
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axes.grid(axis='y')


def scatter_figure(
    rows: Rows,
    series: Sequence[str],
    label: str,
    horizontal: Sequence[Quantity],
    vertical: Quantity,
) -> Figure:
    """Draw one property over others, a mark per row.

    Args:
        rows (Rows): ``facet, series`` and the quantities, by their names.
        series (Sequence[str]): Order of the legend.
        label (str): Meaning of the series.
        horizontal (Sequence[Quantity]): A column of panels each.
        vertical (Quantity): Of all panels; logarithmic where it spans orders
            of magnitude.

    Returns:
        Figure: A line of panels per facet.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, grid = style.panels(
            len(facets), len(horizontal), 2.3, sharex='col', sharey='row'
        )
        for line, facet in zip(grid, facets, strict=True):
            chosen = select(rows, facet=facet)
            for axes, quantity in zip(line, horizontal, strict=True):
                for number, name in enumerate(series):
                    own = select(chosen, series=name)
                    places = columns(own, quantity.name, vertical.name)
                    axes.plot(*places, **_dots(number))
                axes.grid()
                axes.set_xlabel(quantity.unit if facet == facets[-1] else '')
            style.scale(line[0], columns(chosen, vertical.name)[0])
            line[0].set_ylabel(vertical.unit)
            line[0].set_title(facet, loc='left')
        handles = [style.handle(**_dots(i)) for i in range(len(series))]
        style.legend_below(figure, handles, series, label)
    return figure


def _dots(number: int) -> dict[str, Any]:
    """Marks of a series, by its place in the legend."""
    color = style.COLORS[number % len(style.COLORS)]
    mark = style.marker(number)
    return dict(ls='', marker=mark, color=color, markersize=2.5, alpha=0.7)
