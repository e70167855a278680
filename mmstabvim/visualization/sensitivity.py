"""Properties of single images against one another."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmstabvim.visualization import style
from mmstabvim.visualization.curves import Quantity

Rows = Sequence[dict[str, Any]]


def scatter_figure(
    rows: Rows,
    series: Sequence[str],
    label: str,
    horizontal: Sequence[Quantity],
    vertical: Quantity,
) -> Figure:
    """One property over others, a mark per row.

    Args:
        rows (Rows): ``facet, series`` and the quantities, by their names.
        series (Sequence[str]): Order of the legend.
        label (str): What the series are.
        horizontal (Sequence[Quantity]): A column of panels each.
        vertical (Quantity): Of all panels; logarithmic where it spans orders
            of magnitude.

    Returns:
        Figure: A line of panels per facet.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        figure, grid = style.panels(
            len(facets), len(horizontal), 2.3, sharex='col', sharey='row'
        )
        for line, facet in zip(grid, facets, strict=True):
            chosen = [row for row in rows if row['facet'] == facet]
            for axes, quantity in zip(line, horizontal, strict=True):
                _draw(axes, chosen, series, quantity.name, vertical.name)
                axes.set_xlabel(quantity.unit if facet == facets[-1] else '')
            line[0].set_ylabel(vertical.unit)
            line[0].set_title(facet, loc='left')
        figure.legend(
            [Line2D([], [], **_mark(i)) for i in range(len(series))],
            series,
            loc='outside lower center',
            ncols=min(len(series), 8),
            title=label,
            title_fontsize=7.5,
        )
    return figure


def _mark(number: int) -> dict[str, Any]:
    """Look of a series, by its place in the legend."""
    return dict(
        linestyle='',
        marker=style.MARKERS[number % len(style.MARKERS)],
        color=style.COLORS[number % len(style.COLORS)],
        markersize=2.5,
        alpha=0.7,
    )


def _draw(
    axes: Any, rows: Rows, series: Sequence[str], x: str, y: str
) -> None:
    """One panel."""
    for number, name in enumerate(series):
        chosen = [row for row in rows if row['series'] == name]
        axes.plot(
            [row[x] for row in chosen],
            [row[y] for row in chosen],
            **_mark(number),
        )
    values = [row[y] for row in rows]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale('log')
    axes.grid()
