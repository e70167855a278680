"""Curves over training: mean and band."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmstabvim.visualization import style

Rows = Sequence[dict[str, Any]]


class Quantity(NamedTuple):
    """What a line of panels shows.

    Attributes:
        name (str): As in the rows; what follows ``' by '`` is the label of
            the horizontal axis.
        unit (str): Label of the vertical axis.
        border (float | None): Where a line is drawn across.
    """

    name: str
    unit: str
    border: float | None = None


def curve_figure(
    rows: Rows,
    series: Sequence[str],
    label: str,
    quantities: Sequence[Quantity],
) -> Figure:
    """Quantities over training, a line per series.

    An axis is logarithmic where its values span orders of magnitude.

    Args:
        rows (Rows): ``quantity, facet, series, step, n, mean, low, high,
            ended``; ``low`` and ``high`` bound the band, ``ended`` counts
            the trainings whose last finite value this is because they
            diverged.
        series (Sequence[str]): Order of the legend.
        label (str): What the series are.
        quantities (Sequence[Quantity]): From top to bottom.

    Returns:
        Figure: A line of panels per quantity, a column per facet.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        figure, grid = style.panels(
            len(quantities), len(facets), 1.75, sharex='row', sharey='row'
        )
        for line, (name, unit, border) in enumerate(quantities):
            for column, facet in enumerate(facets):
                axes = grid[line, column]
                chosen = [
                    row
                    for row in rows
                    if row['quantity'] == name and row['facet'] == facet
                ]
                _draw(axes, chosen, series)
                if border is not None:
                    axes.axhline(border, color=style.GREY, lw=0.8, ls='--')
                if line == 0:
                    axes.set_title(facet)
                axes.set_xlabel(name.partition(' by ')[2])
            means = [row['mean'] for row in rows if row['quantity'] == name]
            style.scale(grid[line, 0], np.array(means))
            grid[line, 0].set_ylabel(unit)
        style.add_legend(figure, series, label)
    return figure


def _draw(axes: Axes, rows: Rows, series: Sequence[str]) -> None:
    """One panel."""
    for number, name in enumerate(series):
        chosen = [row for row in rows if row['series'] == name]
        if not chosen:
            continue
        look = style.line_style(number)
        steps = np.array([row['step'] for row in chosen], float)
        mean, low, high = (
            np.array([row[key] for row in chosen], float)
            for key in ('mean', 'low', 'high')
        )
        axes.plot(steps, mean, **look)
        axes.fill_between(
            steps, low, high, color=look['color'], alpha=0.12, lw=0
        )
        ended = np.array([row['ended'] > 0 for row in chosen])
        axes.plot(
            steps[ended],
            mean[ended],
            'x',
            color=look['color'],
            markersize=5,
            markeredgewidth=1.4,
            zorder=4,
        )
    style.tidy_steps(axes)
    axes.grid()
    if not rows:
        style.say_empty(axes)
