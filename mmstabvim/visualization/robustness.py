"""Figures of robustness: modes over frequency, and other corruptions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmstabvim.visualization import style
from mmstabvim.visualization.curves import Quantity

Rows = Sequence[dict[str, Any]]

_SPREAD = 0.5  # of the series around the place of a name
_FEW = 12  # points that are marked


def robustness_figure(
    modes: Rows,
    others: Rows,
    series: Sequence[str],
    label: str,
    quantities: Sequence[Quantity],
) -> Figure:
    """Quantities over the frequency of a mode; at the right other kinds.

    Args:
        modes (Rows): ``quantity, facet, series, x, mean, low, high``; ``low``
            and ``high`` bound the band.
        others (Rows): The same with ``name`` in place of ``x``.
        series (Sequence[str]): Order of the legend.
        label (str): What the series are.
        quantities (Sequence[Quantity]): From top to bottom.

    Returns:
        Figure: For each quantity and facet a wide panel and a narrow one
        with a common vertical axis.
    """
    with style.look():
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
                _draw_modes(wide, _choose(modes, quantity, facet), series)
                _draw_others(narrow, _choose(others, quantity, facet), series)
                if quantity is quantities[0]:
                    wide.set_title(facet)
                if quantity is quantities[-1]:
                    wide.set_xlabel('frequency (cycles per token)')
            line[0].set_ylabel(quantity.unit)
        style.add_legend(figure, series, label)
    return figure


def _choose(rows: Rows, quantity: Quantity, facet: str) -> Rows:
    return [
        row
        for row in rows
        if row['quantity'] == quantity.name and row['facet'] == facet
    ]


def _columns(rows: Rows, *names: str) -> list[np.ndarray]:
    return [np.array([row[name] for row in rows], float) for name in names]


def _draw_modes(axes: Axes, rows: Rows, series: Sequence[str]) -> None:
    """Lines with bands."""
    for number, name in enumerate(series):
        chosen = [row for row in rows if row['series'] == name]
        x, mean, low, high = _columns(chosen, 'x', 'mean', 'low', 'high')
        look = style.line_style(number)
        marker = style.MARKERS[number % len(style.MARKERS)]
        marker = marker if len(x) <= _FEW else ''
        axes.plot(x, mean, marker=marker, markersize=3, **look)
        axes.fill_between(x, low, high, color=look['color'], alpha=0.12, lw=0)
    axes.grid()
    if not rows:
        style.say_empty(axes)


def _draw_others(axes: Axes, rows: Rows, series: Sequence[str]) -> None:
    """Points with bars, side by side above each name."""
    names = style.unique(rows, 'name')
    for number, name in enumerate(series):
        chosen = [row for row in rows if row['series'] == name]
        mean, low, high = _columns(chosen, 'mean', 'low', 'high')
        shift = _SPREAD * ((number + 0.5) / len(series) - 0.5)
        places = [names.index(row['name']) + shift for row in chosen]
        axes.errorbar(
            places,
            mean,
            yerr=[mean - low, high - mean],
            fmt=style.MARKERS[number % len(style.MARKERS)],
            color=style.line_style(number)['color'],
            markersize=3,
            elinewidth=0.8,
        )
    axes.set_xticks(range(len(names)), names, rotation=60, ha='right')
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axes.grid(axis='y')
