"""Curves over training: mean and band."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmstabvim.reporting import style
from mmstabvim.reporting.style import Rows, columns, select


class Quantity(NamedTuple):
    """Content of a line of panels."""

    name: str
    """Name in the rows; a part after ``' by '`` is the label of x."""
    unit: str
    """Label of the vertical axis."""
    border: float | None = None
    """Value at which a line is drawn across."""


def draw_lines(
    axes: Axes,
    rows: Rows,
    series: Sequence[str],
    x: str = 'x',
    y: str = 'value',
    band: bool = False,
    few: int = 0,
) -> None:
    """Draw a line for each series that has rows, on a grid.

    Args:
        axes (Axes): The panel.
        rows (Rows): ``series`` and the columns named below; with a band
            ``low`` and ``high``, too.
        series (Sequence[str]): In the order of the legend.
        x (str): Horizontal column. Defaults to ``'x'``.
        y (str): Vertical column. Defaults to ``'value'``.
        band (bool): Tint the space from ``low`` to ``high``. Defaults to
            False.
        few (int): Number of points up to which each is marked. Defaults to 0.
    """
    for number, name in enumerate(series):
        chosen = select(rows, series=name)
        if not chosen:
            continue
        drawn = style.line_style(number)
        places, values = columns(chosen, x, y)
        if len(chosen) <= few:
            drawn |= dict(marker=style.marker(number), markersize=3.5)
        axes.plot(places, values, **drawn)
        if band:
            low, high = columns(chosen, 'low', 'high')
            tint: Any = dict(color=drawn['color'], alpha=0.12, lw=0)
            axes.fill_between(places, low, high, **tint)
    axes.grid()
    if not rows:
        style.say_empty(axes)


def curve_figure(
    rows: Rows,
    series: Sequence[str],
    label: str,
    quantities: Sequence[Quantity],
) -> Figure:
    """Draw quantities over training, a line per series.

    An axis is logarithmic where its values span orders of magnitude.

    Args:
        rows (Rows): ``quantity, facet, series, step, n, mean, low, high,
            ended``; ``low`` and ``high`` bound the band, ``ended`` counts
            the trainings whose last finite value this is because they
            diverged.
        series (Sequence[str]): Order of the legend.
        label (str): Meaning of the series.
        quantities (Sequence[Quantity]): From top to bottom.

    Returns:
        Figure: A line of panels per quantity, a column per facet.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, grid = style.panels(
            len(quantities), len(facets), 1.75, sharex='row', sharey='row'
        )
        for line, quantity in zip(grid, quantities, strict=True):
            own = select(rows, quantity=quantity.name)
            for axes, facet in zip(line, facets, strict=True):
                chosen = select(own, facet=facet)
                draw_lines(axes, chosen, series, 'step', 'mean', band=True)
                _mark_ends(axes, chosen, series)
                style.draw_border(axes, quantity.border)
                style.tidy_steps(axes)
                axes.set_title(facet if quantity is quantities[0] else '')
                axes.set_xlabel(quantity.name.partition(' by ')[2])
            style.scale(line[0], columns(own, 'mean')[0])
            line[0].set_ylabel(quantity.unit)
        style.add_legend(figure, series, label)
    return figure


def _mark_ends(axes: Axes, rows: Rows, series: Sequence[str]) -> None:
    """Cross out the last finite values of trainings that diverged."""
    for number, name in enumerate(series):
        ended = [row for row in select(rows, series=name) if row['ended'] > 0]
        axes.plot(
            *columns(ended, 'step', 'mean'),
            'x',
            color=style.line_style(number)['color'],
            markersize=5,
            markeredgewidth=1.4,
            zorder=4,
        )
