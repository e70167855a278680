"""Stable rank normalization of convolution kernels: what solvers do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from mmstabvim.visualization import style

Rows = Sequence[dict[str, Any]]
_FRONT, _PATH, _EXACT = '#FFFFFF', '#D55E00', '#56B4E9'
_LINES = ('#D55E00', '#0072B2', '#009E73', '#882255')


def _column(rows: Rows, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], float)


def form_eigenvalue_figure(rows: Rows, count: int) -> Figure:
    """Eigenvalues of the quadratic form that is each frequency's gain.

    Args:
        rows (Rows): ``frequency, largest, second``.
        count (int): Taps of the kernel, which bounds them.

    Returns:
        Figure: One panel.
    """
    with style.look():
        figure, grid = style.panels(1, 1, 2.5)
        axes = grid[0, 0]
        frequency = _column(rows, 'frequency')
        for number, name in enumerate(('largest', 'second')):
            axes.plot(
                frequency,
                _column(rows, name),
                marker=style.MARKERS[number],
                markersize=2.5,
                linewidth=1.0,
                color=_LINES[number],
            )
        axes.axhline(count, color=style.GREY, lw=0.8, ls=':')
        axes.set_xlabel('frequency k')
        axes.set_ylabel('eigenvalue of $B_k$')
        axes.set_ylim(-0.08 * count, 1.08 * count)
        axes.margins(x=0.02)
        axes.grid()
        lines = axes.get_lines()[:2]
        figure.legend(
            lines,
            ['largest', 'second largest'],
            loc='outside lower center',
            ncols=2,
        )
    return figure


def sphere_figure(
    surface: Rows, path: Rows, marks: Rows, target: float
) -> Figure:
    """Way of a descent on the unit sphere, over the stable rank.

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
    with style.look():
        facets = style.unique(surface, 'facet')
        figure, grid = style.panels(1, len(facets), 3.1)
        ranks = _column(surface, 'stable_rank')
        levels = np.arange(2 * (ranks.min() // 2), ranks.max() + 2, 2)
        for axes, facet in zip(grid[0], facets, strict=True):
            here = [
                [row for row in rows if row['facet'] == facet]
                for rows in (surface, path, marks)
            ]
            filled = _draw_surface(axes, here[0], levels, target)
            _draw_path(axes, here[1])
            _draw_marks(axes, here[2])
            axes.set_title(facet)
            axes.set_aspect('equal')
            axes.set_axis_off()
        bar = figure.colorbar(filled, ax=grid, shrink=0.8, pad=0.02)
        bar.set_label('stable rank')
        bar.ax.axhline(target, color=_FRONT, lw=1.5)
        bar.ax.yaxis.set_major_locator(MultipleLocator(8))
        _add_mark_legend(figure, marks, target)
    return figure


def _draw_surface(
    axes: Axes, rows: Rows, levels: np.ndarray, target: float
) -> Any:
    """Stable rank as colour, and the contour of the target."""
    shape = [1 + max(row[name] for row in rows) for name in ('row', 'column')]
    x, y, values = (
        _column(rows, name).reshape(shape)
        for name in ('x', 'y', 'stable_rank')
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
    """The way; dotted where it is behind the sphere."""
    x, y, depth = (_column(rows, name) for name in ('x', 'y', 'depth'))
    for front, dashes in ((depth >= 0, '-'), (depth <= 0, ':')):
        axes.plot(
            np.where(front, x, np.nan),
            np.where(front, y, np.nan),
            color=_PATH,
            ls=dashes,
            lw=1.6,
            solid_capstyle='round',
        )


def _draw_marks(axes: Axes, rows: Rows) -> None:
    for row in rows:
        axes.plot(row['x'], row['y'], **_mark(row['name'], row['depth'] >= 0))


def _mark(name: str, front: bool = True) -> dict[str, Any]:
    """Look of a named point; hollow where it is behind the sphere."""
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


def _add_mark_legend(figure: Figure, marks: Rows, target: float) -> None:
    names = style.unique(marks, 'name')
    handles = [Line2D([], [], **_mark(name)) for name in names]
    contour = Line2D([], [], color='#BBBBBB', lw=1.5)
    figure.legend(
        [*handles, Line2D([], [], color=_PATH, lw=1.6), contour],
        [*names, 'descent', f'stable rank {target:g} (white)'],
        loc='outside lower center',
        ncols=6,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def descent_figure(rows: Rows, series: Sequence[str], target: float) -> Figure:
    """Objective and stable rank along descents.

    Args:
        rows (Rows): ``series, step, objective, stable_rank``.
        series (Sequence[str]): Order of the legend.
        target (float): Stable rank that was asked for.

    Returns:
        Figure: A panel for each of the two.
    """
    with style.look():
        figure, grid = style.panels(1, 2, 2.3)
        for axes, name in zip(
            grid[0], ('objective', 'stable_rank'), strict=True
        ):
            for number, label in enumerate(series):
                chosen = [row for row in rows if row['series'] == label]
                axes.plot(
                    _column(chosen, 'step'),
                    _column(chosen, name),
                    color=_LINES[number % len(_LINES)],
                )
            style.tidy_steps(axes)
            axes.set_xlabel('iterate')
            axes.grid()
        grid[0, 0].set_ylabel('objective h')
        style.scale(grid[0, 0], _column(rows, 'objective'))
        grid[0, 1].set_ylabel('stable rank')
        grid[0, 1].axhline(target, color=style.GREY, lw=0.8, ls='--')
        grid[0, 1].annotate(
            f'asked for: {target:g}',
            (0.98, target),
            xycoords=('axes fraction', 'data'),
            xytext=(0, 3),
            textcoords='offset points',
            ha='right',
            color=style.GREY,
            fontsize=7,
        )
        figure.legend(
            grid[0, 0].get_lines()[: len(series)],
            series,
            loc='outside lower center',
            ncols=len(series),
        )
    return figure


def target_figure(rows: Rows, spectra: Rows, series: Sequence[str]) -> Figure:
    """What solvers reach for each target, and a kernel's spectrum.

    Args:
        rows (Rows): ``facet, series, target, stable_rank, gain``; ``gain`` is
            the largest singular value over the given one.
        spectra (Rows): ``facet, index, value``, singular values in falling
            order of what should be a matrix of rank one and norm 1.
        series (Sequence[str]): Order of the legend.

    Returns:
        Figure: A line of three panels per facet.
    """
    with style.look():
        facets = style.unique(rows, 'facet')
        figure, grid = style.panels(len(facets), 3, 1.95)
        for line, facet in zip(grid, facets, strict=True):
            chosen = [row for row in rows if row['facet'] == facet]
            target = _column(chosen, 'target')
            line[0].plot(target, target, color=style.GREY, lw=0.8, ls='--')
            line[1].axhline(1, color=style.GREY, lw=0.8, ls='--')
            for name, axes in zip(('stable_rank', 'gain'), line, strict=False):
                _draw_targets(axes, chosen, series, name)
            line[0].set_ylabel('stable rank')
            line[1].set_ylabel('largest singular value')
            for axes in line:
                axes.set_title(facet)
            here = [row for row in spectra if row['facet'] == facet]
            _draw_spectrum(line[2], here)
        lines = grid[0, 0].get_lines()[: len(series) + 1]
        figure.legend(
            lines,
            ['asked for', *series],
            loc='outside lower center',
            ncols=len(lines),
        )
    return figure


def _draw_targets(
    axes: Axes, rows: Rows, series: Sequence[str], name: str
) -> None:
    for number, label in enumerate(series):
        chosen = [row for row in rows if row['series'] == label]
        axes.plot(
            _column(chosen, 'target'),
            _column(chosen, name),
            color=_LINES[number % len(_LINES)],
        )
    axes.set_xlabel('stable rank asked for')
    axes.grid()


def _draw_spectrum(axes: Axes, rows: Rows) -> None:
    """Bars, and the spectrum that there should be."""
    index, value = _column(rows, 'index'), _column(rows, 'value')
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
