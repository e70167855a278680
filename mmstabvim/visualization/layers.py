"""Every layer in a panel, or on an axis: spectra, histograms, quantiles."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator, ScalarFormatter

from mmstabvim.visualization import style

Rows = Sequence[dict[str, Any]]

PAIR = ('#0072B2', '#D55E00')
"""Of two series that are drawn over one another."""

_COLUMNS = 4
_BANDS = (('q05', 'q95', 0.13), ('q25', 'q75', 0.25))


def _panels(
    facets: Sequence[str], height: float, share_y: bool = True
) -> tuple[Figure, list[tuple[Axes, str]]]:
    """A panel per facet, four in a line."""
    columns = min(max(len(facets), 1), _COLUMNS)
    lines = max(math.ceil(len(facets) / columns), 1)
    figure, grid = style.panels(
        lines, columns, height, sharex=True, sharey=share_y
    )
    for axes in list(grid.flat)[len(facets) :]:
        axes.set_visible(False)
    # what would be hidden tells nobody its numbers
    for axes in list(grid.flat)[: len(facets)][-columns:]:
        axes.tick_params(labelbottom=True)
    return figure, list(zip(grid.flat, facets, strict=False))


def _choose(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def _column(rows: Rows, name: str) -> Any:
    return np.array([row[name] for row in rows], float)


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
    """Eigenvalues in the complex plane, a panel per layer.

    Right of the dashed line a state grows. Where all eigenvalues of all
    panels are real the plane is a line; the first series is then spread by
    its channels above it, the second below.

    Args:
        rows (Rows): ``facet, series, real, imag, place``; the place of a
            channel is in [0, 1].
        series (Sequence[str]): One or two.
        label (str): What the series are. Defaults to none.

    Returns:
        Figure: All panels on common axes.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        figure, panels = _panels(facets, 1.3)
        real, imag = _column(rows, 'real'), _column(rows, 'imag')
        plane = bool(
            len(rows) and np.abs(imag).max() > 1e-6 * np.abs(real).max()
        )
        for axes, facet in panels:
            for number, name in enumerate(series):
                chosen = _choose(rows, facet=facet, series=name)
                place = _column(chosen, 'place') * (1, -1)[number % 2]
                axes.scatter(
                    _column(chosen, 'real'),
                    _column(chosen, 'imag') if plane else place,
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
    """Of a mark; in a plane the first series shows around the second."""
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
    """Histograms over one another, a panel per layer.

    Args:
        rows (Rows): ``facet, series, low, high, share``, a bin each; an
            infinite end is drawn as wide as the bin before.
        series (Sequence[str]): One or two.
        horizontal (str): Label of the horizontal axis.
        label (str): What the series are. Defaults to none.
        log_x (bool): Whether the horizontal axis is logarithmic. Defaults to
            False.
        border (float, optional): Where a line is drawn. Defaults to None.

    Returns:
        Figure: All panels on common axes, shares in percent.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        figure, panels = _panels(facets, 1.25, share_y=False)
        for axes, facet in panels:
            for number, name in enumerate(series):
                chosen = _choose(rows, facet=facet, series=name)
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
    low, high = _column(rows, 'low'), _column(rows, 'high')
    edges = np.append(low, high[-1])
    if np.isinf(edges[-1]):
        edges[-1] = 2 * edges[-2] - edges[-3]
    share = 100 * _column(rows, 'share')
    axes.stairs(share, edges, fill=True, alpha=0.25, color=color)
    axes.stairs(share, edges, color=color, linewidth=1.0)


def quantile_figure(
    rows: Rows,
    series: Sequence[str],
    vertical: str,
    label: str = '',
    border: tuple[float, str] | None = None,
) -> Figure:
    """Median and bands over the layers, a panel per facet.

    Args:
        rows (Rows): ``facet, series, x`` and the quantiles ``q05, q25, q50,
            q75, q95``; infinite ones leave a gap.
        series (Sequence[str]): One or two.
        vertical (str): Label of the vertical axis, which is logarithmic.
        label (str): What the series are. Defaults to none.
        border (tuple[float, str], optional): Where a line is drawn, and what
            it is. Defaults to None.

    Returns:
        Figure: Panels beside one another.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        figure, grid = style.panels(1, max(len(facets), 1), 2.2, sharey=True)
        for axes, facet in zip(grid[0], facets, strict=False):
            for number, name in enumerate(series):
                chosen = _choose(rows, facet=facet, series=name)
                _draw_bands(axes, chosen, PAIR[number % 2])
            if border is not None:
                axes.axhline(border[0], color=style.GREY, lw=0.8, ls='--')
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
    x = _column(rows, 'x')
    for low, high, alpha in _BANDS:
        ends = [_finite(_column(rows, name)) for name in (low, high)]
        axes.fill_between(x, *ends, color=color, alpha=alpha, lw=0)
    median = _finite(_column(rows, 'q50'))
    axes.plot(x, median, color=color, marker='o', markersize=2.5)


def _finite(values: Any) -> Any:
    return np.where(np.isfinite(values), values, np.nan)


def heat_figure(
    rows: Rows,
    horizontal: str,
    vertical: str,
    unit: str,
    limits: tuple[float, float] | None = None,
    colors: str = 'viridis',
) -> Figure:
    """One number for each pair of two names, as colour.

    Args:
        rows (Rows): ``facet, x, y, value``; what is missing or not finite is
            black.
        horizontal (str): Label of x.
        vertical (str): Label of y.
        unit (str): Label of the colours.
        limits (tuple[float, float], optional): Ends of the colours. Defaults
            to None, for those of the values.
        colors (str): Matplotlib's name of a colour map. Defaults to
            ``'viridis'``.

    Returns:
        Figure: A panel per facet, below one another; the first y on top.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        names = style.unique(rows, 'y')
        height = min(max(0.13 * len(names) + 0.55, 1.9), 4.5)
        figure = Figure(
            (style.WIDTH, height * len(facets) + 0.3), layout='constrained'
        )
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(facets), 1, squeeze=False, sharex=True)
        values = _finite(_column(rows, 'value'))
        known = values[~np.isnan(values)]
        if limits is None:
            ends = known if len(known) else np.array([0.0, 1.0])
            limits = float(ends.min()), float(ends.max())
        norm = Normalize(*limits, clip=True)
        for axes, facet in zip(grid[:, 0], facets, strict=True):
            _draw_heat(axes, _choose(rows, facet=facet), names, norm, colors)
            axes.set_title(facet)
            axes.set_ylabel(vertical)
        grid[-1, 0].set_xlabel(horizontal)
        scale = matplotlib.cm.ScalarMappable(norm, colors)
        figure.colorbar(scale, ax=grid, pad=0.02, label=unit)
    return figure


def _draw_heat(
    axes: Axes, rows: Rows, names: Sequence[Any], norm: Normalize, colors: str
) -> None:
    """One panel."""
    places = sorted({row['x'] for row in rows})
    grid = np.full((len(names), len(places)), np.nan)
    line = {name: i for i, name in enumerate(names)}
    column = {place: i for i, place in enumerate(places)}
    for row in rows:
        value = row['value']
        grid[line[row['y']], column[row['x']]] = (
            np.nan if value is None else value
        )
    cmap = matplotlib.colormaps[colors].with_extremes(bad='black')
    axes.imshow(
        np.ma.masked_invalid(grid),
        cmap=cmap,
        norm=norm,
        aspect='auto',
        interpolation='nearest',
    )
    stride = max(1, math.ceil(len(names) / 28))
    chosen = range(0, len(names), stride)
    axes.set_yticks(
        list(chosen),
        [str(names[i]) for i in chosen],
        fontsize=6 if len(names) > 14 else None,
    )
    axes.spines[:].set_visible(False)
    style.tidy_steps(axes)


def spectrum_figure(
    rows: Rows, vertical: str = r'$\sigma_i / \sigma_1$'
) -> Figure:
    """Singular values in falling order, a panel per kind of weight.

    Args:
        rows (Rows): ``facet, layer, name, x, value``; ``x`` in [0, 1] is the
            place in the order, a line per name; ``layer`` None is outside of
            the layers, and black.
        vertical (str): Label of the vertical axis, which is logarithmic.

    Returns:
        Figure: Four panels in a line; the colour is the depth.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        figure, panels = _panels(facets, 1.5)
        layers = [row['layer'] for row in rows if row['layer'] is not None]
        norm = Normalize(0, max([*layers, 1]))
        colors = matplotlib.colormaps['viridis']
        for axes, facet in panels:
            chosen = _choose(rows, facet=facet)
            for name in style.unique(chosen, 'name'):
                line = _choose(chosen, name=name)
                layer = line[0]['layer']
                axes.plot(
                    _column(line, 'x'),
                    _column(line, 'value'),
                    color='black' if layer is None else colors(norm(layer)),
                    linewidth=0.8,
                )
            axes.set_yscale('log')
            axes.set_title(facet, pad=2)
            axes.grid()
        low = _column(rows, 'value').min() if rows else 1e-3
        panels[0][0].set_ylim(max(low / 1.5, 1e-6), 1.5)
        figure.supxlabel('place in the order (0 largest, 1 last)', fontsize=8)
        figure.supylabel(vertical, fontsize=8)
        if layers:
            scale = matplotlib.cm.ScalarMappable(norm, colors)
            bar = figure.colorbar(
                scale, ax=[axes for axes, _ in panels], pad=0.02
            )
            bar.set_label('layer')
            _tick_whole(bar)
    return figure


def _tick_whole(bar: Any) -> None:
    """Whole numbers on a colour bar."""
    bar.locator = matplotlib.ticker.MaxNLocator(5, integer=True)
    bar.update_ticks()


def small_line_figure(
    rows: Rows,
    series: Sequence[str],
    horizontal: str,
    borders: dict[str, float] | None = None,
) -> Figure:
    """Curves in small panels, each with a scale of its own.

    Args:
        rows (Rows): ``facet, series, x, value``, finite.
        series (Sequence[str]): Order of the legend, which is left out for
            one.
        horizontal (str): Label of the horizontal axes.
        borders (dict[str, float], optional): Where a line is drawn across,
            by facet. Defaults to None.

    Returns:
        Figure: Three panels in a line.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        columns = min(len(facets), 3)
        lines = math.ceil(len(facets) / columns)
        figure, grid = style.panels(lines, columns, 1.45)
        for axes in list(grid.flat)[len(facets) :]:
            axes.set_visible(False)
        for axes, facet in zip(grid.flat, facets, strict=False):
            chosen = _choose(rows, facet=facet)
            for number, name in enumerate(series):
                line = _choose(chosen, series=name)
                axes.plot(
                    _column(line, 'x'),
                    _column(line, 'value'),
                    color=PAIR[number % 2],
                    marker='o' if len(line) <= 30 else '',
                    markersize=2.0,
                )
            border = (borders or {}).get(facet)
            if border is not None:
                axes.axhline(border, color=style.GREY, lw=0.8, ls='--')
            style.scale(axes, _column(chosen, 'value'))
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
