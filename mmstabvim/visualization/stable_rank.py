"""Solvers of stable rank normalization for convolution kernels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from mmstabvim.reporting import style
from mmstabvim.reporting.style import Rows, columns, select

_FRONT, _PATH, _EXACT = '#FFFFFF', '#D55E00', '#56B4E9'
_LINES = ('#D55E00', '#0072B2')


def sphere_figure(
    surface: Rows, path: Rows, marks: Rows, target: float
) -> Figure:
    """Draw the path of a descent on the unit sphere, over the stable rank.

    Args:
        surface (Rows): ``facet, row, column, x, y, stable_rank`` on a lattice
            of rows and columns, as seen along the line of sight.
        path (Rows): ``facet, x, y, depth``; depth below 0 is behind the
            sphere.
        marks (Rows): ``facet, x, y, depth, name``.
        target (float): Stable rank whose contour is drawn.

    Returns:
        Figure: A panel per facet.
    """
    with style.figure_style():
        facets = style.unique(surface, 'facet')
        figure, grid = style.panels(1, len(facets), 3.1)
        (ranks,) = columns(surface, 'stable_rank')
        levels = np.arange(2 * (ranks.min() // 2), ranks.max() + 2, 2)
        for axes, facet in zip(grid[0], facets, strict=True):
            here = select(surface, facet=facet)
            filled = _draw_surface(axes, here, levels, target)
            _draw_path(axes, select(path, facet=facet))
            for row in select(marks, facet=facet):
                mark = _mark(row['name'], row['depth'] >= 0)
                axes.plot(row['x'], row['y'], **mark)
            axes.set_title(facet)
            axes.set_aspect('equal')
            axes.set_axis_off()
        bar = figure.colorbar(filled, ax=grid, shrink=0.8, pad=0.02)
        bar.set_label('stable rank')
        bar.ax.axhline(target, color=_FRONT, lw=1.5)
        bar.ax.yaxis.set_major_locator(MultipleLocator(8))
        names = style.unique(marks, 'name')
        handles = [style.handle(**_mark(name)) for name in names]
        handles.append(style.handle(color=_PATH, lw=1.6))
        handles.append(style.handle(color='#BBBBBB', lw=1.5))
        names += ['descent', f'stable rank {target:g} (white)']
        style.legend_below(figure, handles, names)
    return figure


def _draw_surface(
    axes: Axes, rows: Rows, levels: np.ndarray, target: float
) -> Any:
    """Draw the stable rank as colour, and the contour of the target."""
    shape = [1 + max(row[name] for row in rows) for name in ('row', 'column')]
    x, y, values = (
        found.reshape(shape)
        for found in columns(rows, 'x', 'y', 'stable_rank')
    )
    filled = axes.contourf(x, y, values, levels=levels, cmap='viridis')
    axes.contour(x, y, values, [target], colors=_FRONT, linewidths=1.2)
    if np.isclose(np.hypot(x, y).max(), 1):  # all of the sphere
        turn = np.linspace(0, 2 * np.pi, 200)
        axes.plot(np.cos(turn), np.sin(turn), color=style.GREY, lw=0.8)
    axes.set_xlim(x.min() * 1.02, x.max() * 1.02)
    axes.set_ylim(y.min() * 1.02, y.max() * 1.02)
    return filled


def _draw_path(axes: Axes, rows: Rows) -> None:
    """Draw the path; dotted where it is behind the sphere."""
    x, y, depth = columns(rows, 'x', 'y', 'depth')
    for front, dashes in ((depth >= 0, '-'), (depth <= 0, ':')):
        axes.plot(
            np.where(front, x, np.nan),
            np.where(front, y, np.nan),
            color=_PATH,
            ls=dashes,
            lw=1.6,
            solid_capstyle='round',
        )


def _mark(name: str, front: bool = True) -> dict[str, Any]:
    """Style of a named point; hollow where it is behind the sphere."""
    color, marker = {
        'start': (_PATH, 'o'),
        'end of the descent': (_PATH, 's'),
        'given kernel': ('#000000', 'X'),
        'exact solution': (_EXACT, '*'),
    }[name]
    return dict(
        marker=marker,
        color=color if front else 'none',
        markeredgecolor=_FRONT if front else color,
        markeredgewidth=0.7,
        markersize=11 if marker == '*' else 7,
        ls='none',
        zorder=5,
    )


def target_figure(rows: Rows, spectra: Rows, series: Sequence[str]) -> Figure:
    """Draw results of solvers for each target, and a kernel's spectrum.

    Args:
        rows (Rows): ``facet, series, target, stable_rank, gain``; ``gain`` is
            the largest singular value over the given one.
        spectra (Rows): ``facet, index, value``, singular values in falling
            order of what should be a matrix of rank one and norm 1.
        series (Sequence[str]): Order of the legend.

    Returns:
        Figure: A line of three panels per facet.
    """
    with style.figure_style():
        facets = style.unique(rows, 'facet')
        figure, grid = style.panels(len(facets), 3, 1.95)
        for line, facet in zip(grid, facets, strict=True):
            chosen = select(rows, facet=facet)
            (target,) = columns(chosen, 'target')
            line[0].plot(target, target, color=style.GREY, lw=0.8, ls='--')
            style.draw_border(line[1], 1)
            for name, axes in zip(('stable_rank', 'gain'), line, strict=False):
                for label, color in zip(series, _LINES, strict=False):
                    own = select(chosen, series=label)
                    axes.plot(*columns(own, 'target', name), color=color)
                axes.set_xlabel('stable rank asked for')
                axes.grid()
            line[0].set_ylabel('stable rank')
            line[1].set_ylabel('largest singular value')
            for axes in line:
                axes.set_title(facet)
            _draw_spectrum(line[2], select(spectra, facet=facet))
        lines = grid[0, 0].get_lines()[: len(series) + 1]
        style.legend_below(figure, lines, ['asked for', *series])
    return figure


def _draw_spectrum(axes: Axes, rows: Rows) -> None:
    """Draw bars, and the spectrum that there should be."""
    index, value = columns(rows, 'index', 'value')
    axes.bar(index, value, width=1.0, color=_LINES[0], alpha=0.7)
    axes.plot(
        [0.5, 1.5, 1.5, len(index) + 0.5],
        [1, 1, 0, 0],
        color='#000000',
        lw=1.2,
        ls='--',
    )
    axes.annotate(
        'should be: 1, 0, 0, …',
        (0.97, 0.9),
        xycoords='axes fraction',
        ha='right',
        fontsize=7,
    )
    axes.set_xlabel('index')
    axes.set_ylabel('singular values of $C(a_1)$')
    axes.set_xlim(0, len(index) + 1)
