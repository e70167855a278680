"""All layers of a model, in panels or on an axis."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from mmstabvim.reporting import style
from mmstabvim.reporting.style import Rows, columns, select

PAIR = ('#0072B2', '#D55E00')
"""Styles of two series that are drawn over one another."""

_COLUMNS = 4
_BANDS = (('q05', 'q95', 0.13), ('q25', 'q75', 0.25))


def _legend(figure: Figure, series: Sequence[str], label: str) -> None:
    handles = [Patch(color=PAIR[i % 2], alpha=0.8) for i in range(len(series))]
    figure.legend(
        handles,
        series,
        # below the panels is the label of their axes
        loc='outside upper center',
        ncols=len(series),
        title=label or None,
        title_fontsize=7.5,
    )


def plane_figure(rows: Rows, series: Sequence[str], label: str = '') -> Figure:
    """Draw eigenvalues in the complex plane, a panel per layer.

    Right of the dashed line a state grows. Where all eigenvalues of all
    panels are real the plane is a line; the first series is then spread by
    its channels above it, the second below.

    Args:
        rows (Rows): ``facet, series, real, imag, place``; the place of a
            channel is in [0, 1].
        series (Sequence[str]): One or two.
        label (str): Meaning of the series. Defaults to none.

    Returns:
        Figure: All panels on common axes.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, _, panels = style.facet_panels(
            facets, _COLUMNS, 1.3, sharex=True, sharey=True
        )
        real, imag = columns(rows, 'real', 'imag')
        plane = bool(
            len(rows) and np.abs(imag).max() > 1e-6 * np.abs(real).max()
        )
        for axes, facet in panels:
            for number, name in enumerate(series):
                chosen = select(rows, facet=facet, series=name)
                x, y, place = columns(chosen, 'real', 'imag', 'place')
                axes.scatter(
                    x,
                    y if plane else place * (1, -1)[number % 2],
                    s=_size(len(chosen), plane, number),
                    color=PAIR[number % 2],
                    linewidths=0,
                    alpha=0.6,
                    rasterized=True,
                )
            axes.axvline(0, color=style.GREY, lw=0.8, ls='--')
            axes.set_title(facet, pad=2)
        if len(rows):
            _limit_plane(panels[0][0], real, imag, plane, series)
        figure.supxlabel('Re λ (1/step)', fontsize=8)
        if plane:
            figure.supylabel('Im λ (1/step)', fontsize=8)
        _legend(figure, series, label)
    return figure


def _size(count: int, plane: bool, number: int) -> float:
    """Size of a mark; the first series shows around the second."""
    few = 3.0 if count > 200 else 8.0
    return 3 * few if plane and number == 0 else few


def _limit_plane(
    axes: Axes, real: Any, imag: Any, plane: bool, series: Sequence[str]
) -> None:
    """Every eigenvalue and the border at zero; a little of the unstable."""
    low, high = min(real.min(), 0.0), max(real.max(), 0.0)
    width = max(high - low, 1e-6)
    axes.set_xlim(low - 0.05 * width, high + 0.08 * width)
    if plane:
        far = max(float(np.abs(imag).max()), 1e-6) * 1.08
        axes.set_ylim(-far, far)
        return
    two = len(series) > 1
    axes.set_ylim(-1.05 if two else -0.05, 1.05)
    axes.set_yticks([0.5, -0.5][: len(series)], list(series))


def histogram_figure(
    rows: Rows,
    series: Sequence[str],
    horizontal: str,
    label: str = '',
    log_x: bool = False,
    border: float | None = None,
) -> Figure:
    """Draw histograms over one another, a panel per layer.

    Args:
        rows (Rows): ``facet, series, low, high, share``, a bin each; an
            infinite end is drawn as wide as the bin before.
        series (Sequence[str]): One or two.
        horizontal (str): Label of the horizontal axis.
        label (str): Meaning of the series. Defaults to none.
        log_x (bool): Whether the horizontal axis is logarithmic. Defaults to
            False.
        border (float, optional): Where a line is drawn. Defaults to None.

    Returns:
        Figure: All panels on common axes, shares in percent.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, _, panels = style.facet_panels(
            facets, _COLUMNS, 1.25, sharex=True
        )
        for axes, facet in panels:
            for number, name in enumerate(series):
                chosen = select(rows, facet=facet, series=name)
                if chosen:
                    _draw_histogram(axes, chosen, PAIR[number % 2])
            if border is not None:
                axes.axvline(border, color=style.GREY, lw=0.8, ls='--')
            if log_x:
                axes.set_xscale('log')
                # hundreds of them would take most of the time
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(facet, pad=2)
            axes.set_ylim(bottom=0)
        figure.supxlabel(horizontal, fontsize=8)
        figure.supylabel('share of all (%)', fontsize=8)
        _legend(figure, series, label)
    return figure


def _draw_histogram(axes: Axes, rows: Rows, color: str) -> None:
    low, high, share = columns(rows, 'low', 'high', 'share')
    edges = np.append(low, high[-1])
    if np.isinf(edges[-1]):
        edges[-1] = 2 * edges[-2] - edges[-3]
    axes.stairs(100 * share, edges, fill=True, alpha=0.25, color=color)
    axes.stairs(100 * share, edges, color=color, linewidth=1.0)


def quantile_figure(
    rows: Rows,
    series: Sequence[str],
    vertical: str,
    label: str = '',
    border: tuple[float, str] | None = None,
) -> Figure:
    """Draw median and bands over the layers, a panel per facet.

    Args:
        rows (Rows): ``facet, series, x`` and the quantiles ``q05, q25, q50,
            q75, q95``; infinite ones leave a gap.
        series (Sequence[str]): One or two.
        vertical (str): Label of the vertical axis, which is logarithmic.
        label (str): Meaning of the series. Defaults to none.
        border (tuple[float, str], optional): Where a line is drawn, and what
            it is. Defaults to None.

    Returns:
        Figure: Panels beside one another.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, grid = style.panels(1, max(len(facets), 1), 2.2, sharey=True)
        for axes, facet in zip(grid[0], facets, strict=False):
            for number, name in enumerate(series):
                chosen = select(rows, facet=facet, series=name)
                _draw_bands(axes, chosen, PAIR[number % 2])
            if border is not None:
                style.draw_border(axes, border[0])
                axes.annotate(
                    border[1],
                    (0.99, border[0]),
                    xycoords=('axes fraction', 'data'),
                    xytext=(0, 2),
                    textcoords='offset points',
                    ha='right',
                    fontsize=6.5,
                    color=style.GREY,
                )
            axes.set_yscale('log')
            axes.set_title(facet)
            axes.set_xlabel('layer')
            style.tidy_steps(axes)
            axes.grid()
        grid[0, 0].set_ylabel(vertical)
        if len(series) > 1:
            _legend(figure, series, label)
    return figure


def _draw_bands(axes: Axes, rows: Rows, color: str) -> None:
    (x,) = columns(rows, 'x')
    for low, high, alpha in _BANDS:
        ends = map(_finite, columns(rows, low, high))
        axes.fill_between(x, *ends, color=color, alpha=alpha, lw=0)
    median = _finite(columns(rows, 'q50')[0])
    axes.plot(x, median, color=color, marker='o', markersize=2.5)


def _finite(values: Any) -> Any:
    return np.where(np.isfinite(values), values, np.nan)


def heat_figure(
    rows: Rows,
    horizontal: str,
    vertical: str,
    unit: str,
    limits: tuple[float, float],
) -> Figure:
    """Draw one number for each pair of two names, as colour.

    Args:
        rows (Rows): ``x, y, value``; what is missing or not finite is black.
        horizontal (str): Label of x.
        vertical (str): Label of y.
        unit (str): Label of the colours.
        limits (tuple[float, float]): Ends of the colours.

    Returns:
        Figure: One panel; the first y on top.
    """
    with style.figure_style():
        names = style.unique(rows, 'y')
        places = sorted({row['x'] for row in rows})
        grid = np.full((len(names), len(places)), np.nan)
        spots = [(names.index(r['y']), places.index(r['x'])) for r in rows]
        for spot, value in zip(spots, columns(rows, 'value')[0], strict=True):
            grid[spot] = value
        height = min(max(0.13 * len(names) + 0.55, 1.9), 4.5)
        figure = Figure((style.WIDTH, height + 0.3), layout='constrained')
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        image = axes.imshow(
            np.ma.masked_invalid(grid),
            cmap=matplotlib.colormaps['viridis'].with_extremes(bad='black'),
            norm=Normalize(*limits, clip=True),
            aspect='auto',
            interpolation='nearest',
        )
        chosen = range(0, len(names), max(1, math.ceil(len(names) / 28)))
        axes.set_yticks(
            list(chosen),
            [str(names[i]) for i in chosen],
            fontsize=6 if len(names) > 14 else None,
        )
        axes.spines[:].set_visible(False)
        style.tidy_steps(axes)
        axes.set(xlabel=horizontal, ylabel=vertical)
        figure.colorbar(image, pad=0.02, label=unit)
    return figure


def spectrum_figure(
    rows: Rows, vertical: str = r'$\sigma_i / \sigma_1$'
) -> Figure:
    """Draw singular values in falling order, a panel per kind of weight.

    Args:
        rows (Rows): ``facet, layer, name, x, value``; ``x`` in [0, 1] is the
            place in the order, a line per name; ``layer`` None is outside of
            the layers, and black.
        vertical (str): Label of the vertical axis, which is logarithmic.

    Returns:
        Figure: Four panels in a line; the colour is the depth.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, _, panels = style.facet_panels(
            facets, _COLUMNS, 1.5, sharex=True, sharey=True
        )
        layers = [row['layer'] for row in rows if row['layer'] is not None]
        norm = Normalize(0, max([*layers, 1]))
        colors = matplotlib.colormaps['viridis']
        for axes, facet in panels:
            chosen = select(rows, facet=facet)
            for name in style.unique(chosen, 'name'):
                line = select(chosen, name=name)
                layer = line[0]['layer']
                color = 'black' if layer is None else colors(norm(layer))
                axes.plot(*columns(line, 'x', 'value'), color=color, lw=0.8)
            axes.set_yscale('log')
            axes.set_title(facet, pad=2)
            axes.grid()
        low = columns(rows, 'value')[0].min() if rows else 1e-3
        panels[0][0].set_ylim(max(low / 1.5, 1e-6), 1.5)
        figure.supxlabel('place in the order (0 largest, 1 last)', fontsize=8)
        figure.supylabel(vertical, fontsize=8)
        if layers:
            scale = matplotlib.cm.ScalarMappable(norm, colors)
            bar = figure.colorbar(
                scale, ax=[axes for axes, _ in panels], pad=0.02
            )
            bar.set_label('layer')
            bar.locator = MaxNLocator(5, integer=True)
            bar.update_ticks()
    return figure


def small_line_figure(
    rows: Rows,
    series: Sequence[str],
    horizontal: str,
    borders: Mapping[str, float] | None = None,
) -> Figure:
    """Draw curves in small panels, each with a scale of its own.

    Args:
        rows (Rows): ``facet, series, x, value``, finite.
        series (Sequence[str]): Order of the legend, which is left out for
            one.
        horizontal (str): Label of the horizontal axes.
        borders (Mapping[str, float], optional): Where a line is drawn across,
            by facet. Defaults to None.

    Returns:
        Figure: Up to three panels in a line.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, _, panels = style.facet_panels(facets, 3, 1.45)
        for axes, facet in panels:
            chosen = select(rows, facet=facet)
            for number, name in enumerate(series):
                line = select(chosen, series=name)
                axes.plot(
                    *columns(line, 'x', 'value'),
                    color=PAIR[number % 2],
                    marker='o' if len(line) <= 30 else '',
                    markersize=2.0,
                )
            style.draw_border(axes, (borders or {}).get(facet))
            style.scale(axes, columns(chosen, 'value')[0])
            if axes.get_yscale() == 'linear':
                axes.yaxis.set_major_formatter(
                    ScalarFormatter(useOffset=False)
                )
            style.tidy_steps(axes)
            axes.set_title(facet)
            axes.grid()
        figure.supxlabel(horizontal, fontsize=8)
        if len(series) > 1:
            _legend(figure, series, '')
    return figure
