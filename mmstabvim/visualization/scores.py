"""Final scores and the learning-rate ladder."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mmstabvim.reporting import style
from mmstabvim.reporting.style import Rows, select

_COLUMNS = 3


def score_figure(
    rows: Rows,
    series: Sequence[str],
    label: str,
    unit: str,
    baseline: str | None = None,
) -> Figure:
    """Draw scores of each series: mean, standard deviation, single seeds.

    Args:
        rows (Rows): ``facet, series, seed, value, mean, std, n, note``, one
            per finished training; where there is none, one with ``n`` 0 and
            the ``note`` to write instead.
        series (Sequence[str]): Order on the axis.
        label (str): Meaning of the series.
        unit (str): Label of the score.
        baseline (str | None): The series whose mean is drawn through the
            panel. Defaults to None.

    Returns:
        Figure: A panel per facet, up to three in a line.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, grid, panels = style.facet_panels(facets, _COLUMNS, 2.3)
        for axes, facet in panels:
            chosen = select(rows, facet=facet)
            _draw_scores(axes, chosen, series)
            _draw_baseline(axes, chosen, baseline)
            axes.set_title(facet)
        for axes in grid[:, 0]:
            axes.set_ylabel(unit)
        figure.supxlabel(label, fontsize=8)
        figure.align_ylabels(grid[:, 0])
    return figure


def rate_figure(
    rows: Rows,
    series: Sequence[str],
    label: str,
    unit: str,
    border: float | None = None,
) -> Figure:
    """Draw scores of each series by learning rate.

    Args:
        rows (Rows): ``facet, series, lr, seed, value, mean, std, n,
            diverged``, one per finished training; where there is none, one
            with ``n`` 0. ``diverged`` counts the trainings that did.
        series (Sequence[str]): Order of the legend.
        label (str): Meaning of the series.
        unit (str): Label of the score.
        border (float | None): Score below which nothing has been learnt.
            Defaults to None.

    Returns:
        Figure: A panel per facet, up to three in a line.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, grid, panels = style.facet_panels(
            facets, _COLUMNS, 2.3, sharex=True, sharey=True
        )
        for axes, facet in panels:
            _draw_rates(axes, select(rows, facet=facet), series)
            style.draw_border(axes, border)
            axes.set_title(facet)
            axes.set_xlabel('learning rate')
        for axes in grid[:, 0]:
            axes.set_ylabel(unit)
        style.add_legend(figure, series, label)
    return figure


def _draw_rates(axes: Axes, rows: Rows, series: Sequence[str]) -> None:
    """Draw one panel, series side by side, so that equal ones are seen."""
    axes.set_xscale('log')
    for number, name in enumerate(series):
        chosen = sorted(select(rows, series=name), key=lambda row: row['lr'])
        color = style.line_style(number)['color']
        aside = 1.07 ** (number - (len(series) - 1) / 2)
        first = {row['lr']: row for row in chosen if row['n']}
        axes.errorbar(
            [lr * aside for lr in first],
            [row['mean'] for row in first.values()],
            yerr=[row['std'] or math.nan for row in first.values()],
            marker=style.marker(number),
            markersize=3.5,
            capsize=2,
            elinewidth=0.9,
            **{**style.line_style(number), 'linewidth': 0.9},
        )
        several = [row for row in chosen if row['n'] > 1]
        axes.scatter(
            [row['lr'] * aside for row in several],
            [row['value'] for row in several],
            s=7,
            facecolors='none',
            edgecolors=color,
            linewidths=0.6,
        )
        lost = sorted({row['lr'] for row in chosen if row['diverged']})
        axes.plot(
            [lr * aside for lr in lost],
            [0.03] * len(lost),
            'x',
            color=color,
            markersize=4,
            markeredgewidth=1.2,
            transform=axes.get_xaxis_transform(),
        )
    rates = sorted({row['lr'] for row in rows})
    axes.set_xticks(rates, [f'{rate:g}' for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis='y')


def _draw_scores(axes: Axes, rows: Rows, series: Sequence[str]) -> None:
    """Draw one panel."""
    for place, name in enumerate(series):
        chosen = select(rows, series=name)
        if not chosen:
            continue
        if not chosen[0]['n']:
            axes.annotate(
                chosen[0]['note'],
                (place, 0.02),
                xycoords=('data', 'axes fraction'),
                rotation=90,
                ha='center',
                va='bottom',
                color=style.GREY,
                fontsize=6.5,
            )
            continue
        first = chosen[0]
        color = style.COLORS[place % len(style.COLORS)]
        # each at its own place, so that equal ones are seen
        half = 0.16 if len(chosen) > 1 else 0.0
        axes.scatter(
            place + np.linspace(-half, half, len(chosen)),
            [row['value'] for row in chosen],
            s=9,
            facecolors='none',
            edgecolors=color,
            linewidths=0.7,
        )
        error = first['std']
        axes.errorbar(
            place,
            first['mean'],
            yerr=None if error is None or math.isnan(error) else error,
            color=color,
            marker=style.marker(place),
            markersize=4.5,
            capsize=3,
            elinewidth=1.1,
        )
    if not any(row['n'] for row in rows):
        axes.set_yticks([])
    few = sum(map(len, series)) <= 12
    turned: Any = {} if few else dict(rotation=45, ha='right')
    axes.set_xticks(range(len(series)), series, **turned)
    axes.set_xlim(-0.6, len(series) - 0.4)
    axes.grid(axis='y')


def _draw_baseline(axes: Axes, rows: Rows, baseline: str | None) -> None:
    means = [r['mean'] for r in rows if r['series'] == baseline and r['n']]
    if means:
        axes.axhline(means[0], color=style.GREY, lw=0.7, ls=':', zorder=1)


def ladder_figure(
    rows: Rows, series: Sequence[str], label: str, unit: str
) -> Figure:
    """Draw the share of diverged trainings by learning rate.

    Args:
        rows (Rows): ``facet, series, lr, diverged, collapsed, n, planned,
            rate, mean``; ``n`` trainings ended, ``mean`` is the score of
            those that did not diverge.
        series (Sequence[str]): From top to bottom.
        label (str): Meaning of the series.
        unit (str): Name of the score.

    Returns:
        Figure: A panel per facet, with the numbers written in.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        rates = sorted({row['lr'] for row in rows})
        columns = max(1, min(len(facets), 12 // len(rates)))
        height = 0.3 * len(series) + 0.5
        figure, grid, panels = style.facet_panels(
            facets, columns, height, sharey=True
        )
        for axes, facet in panels:
            chosen = select(rows, facet=facet)
            image = _draw_ladder(axes, chosen, series, rates)
            axes.set_title(facet)
        for axes in grid[:, 0]:
            axes.set_ylabel(label)
        figure.supxlabel(
            'learning rate; in the boxes: diverged / ended trainings, '
            f'mean {unit} of the others',
            fontsize=7.5,
        )
        figure.colorbar(
            image, ax=grid, label='share diverged', aspect=30, pad=0.02
        )
    return figure


def _draw_ladder(
    axes: Axes, rows: Rows, series: Sequence[str], rates: Sequence[float]
) -> Any:
    """Draw one panel; what has not ended is grey."""
    values = np.full((len(series), len(rates)), np.nan)
    for row in rows:
        place = series.index(row['series']), rates.index(row['lr'])
        if row['n']:
            values[place] = row['rate']
        _write_box(axes, place, row)
    colors = matplotlib.colormaps['Oranges'].with_extremes(bad='#E8E8E8')
    image = axes.imshow(values, cmap=colors, vmin=0, vmax=1, aspect='auto')
    axes.set_xticks(range(len(rates)), [f'{rate:g}' for rate in rates])
    axes.set_yticks(range(len(series)), series)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _write_box(
    axes: Axes, place: tuple[int, int], row: dict[str, Any]
) -> None:
    """Write counts and score into one box."""
    text = f'{row["diverged"]}/{row["n"]}' if row['n'] else 'none'
    if row['n'] < row['planned']:
        text += f' of {row["planned"]}'
    if row['mean'] is not None:
        text += f'\n{row["mean"]:.{2 if abs(row["mean"]) >= 1 else 4}f}'
    if row['collapsed']:
        text += f'\n{row["collapsed"]} collapsed'
    dark = bool(row['n']) and row['rate'] > 0.5
    axes.text(
        place[1],
        place[0],
        text,
        ha='center',
        va='center',
        fontsize=6,
        linespacing=1.05,
        color='white' if dark else 'black',
    )
