"""Eigenvalues and decay of the state matrices over training."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure

from mmstabvim.reporting import style
from mmstabvim.reporting.style import Rows, columns, select

_COLUMNS = 4
_ABSENT = '#D0D0D0'


def eigenvalue_figure(rows: Rows, series: Sequence[str]) -> Figure:
    """Draw eigenvalues of the state matrices as training goes on.

    Complex eigenvalues are shown in the complex plane with the step as
    colour; real ones, and those whose imaginary parts are below a fiftieth of
    the largest real part, over the step. The dashed line is the border of
    stability, Re = 0, the tinted side unstable. The axes hold the middle
    99 % of all eigenvalues.

    Args:
        rows (Rows): ``series, step, layer, real, imag``.
        series (Sequence[str]): Titles of the panels.

    Returns:
        Figure: A panel per series.
    """
    with style.figure_style():
        figure, grid, panels = style.facet_panels(
            series, _COLUMNS, 1.75, sharex=True, sharey=True
        )
        real, imag, steps = columns(rows, 'real', 'imag', 'step')
        names = np.array([row['series'] for row in rows])
        plane = is_plane(rows)
        norm = Normalize(steps.min(), max(steps.max(), steps.min() + 1))
        for axes, name in panels:
            chosen = names == name
            x, y = (real, imag) if plane else (steps, real)
            axes.scatter(
                x[chosen],
                y[chosen],
                c=steps[chosen],
                norm=norm,
                s=4.0,
                linewidths=0,
                alpha=0.75,
                rasterized=True,
            )
            _draw_border(axes, plane, float(max(real.max(), 0.0)))
            axes.set_title(name)
            if not chosen.any():
                style.say_empty(axes)
        horizontal = 'Re λ (1/step)' if plane else 'training iteration'
        figure.supxlabel(horizontal, fontsize=8)
        vertical = 'Im λ (1/step)' if plane else 'Re λ (1/step)'
        figure.supylabel(vertical, fontsize=8)
        if plane:
            _limit(grid[0, 0].set_xlim, real)
            _limit(grid[0, 0].set_ylim, imag)
            scale = matplotlib.cm.ScalarMappable(norm, 'viridis')
            bar = figure.colorbar(scale, ax=grid, shrink=0.8, pad=0.02)
            bar.set_label('training iteration')
        else:
            _limit(grid[0, 0].set_ylim, real)
            style.tidy_steps(grid[0, 0])
    return figure


def is_plane(rows: Rows) -> bool:
    """Decide that :func:`eigenvalue_figure` shows the complex plane.

    Args:
        rows (Rows): ``real, imag``.

    Returns:
        bool: False for eigenvalues that are real, or nearly.
    """
    real = max(abs(row['real']) for row in rows)
    return max(abs(row['imag']) for row in rows) > 0.02 * real


def _draw_border(axes: Axes, plane: bool, far: float) -> None:
    """The border of stability, and the side where a state grows."""
    line = axes.axvline if plane else axes.axhline
    span = axes.axvspan if plane else axes.axhspan
    line(0, color=style.GREY, lw=0.8, ls='--')
    span(0, 2 * far + 1, color='#D7191C', alpha=0.07, lw=0, zorder=0)


def _limit(set_limits: Any, values: Any) -> None:
    """Leave out the far ends; keep the border at zero in sight."""
    low, high = np.quantile(values, [0.005, 0.995])
    low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.06 * max(high - low, 1e-6)
    set_limits(low - margin, high + margin)


def decay_figure(rows: Rows, series: Sequence[str]) -> Figure:
    """Draw the largest ``|exp(delta A)|`` of each layer over training.

    White is 1, the border: blue states forget, red ones grow. The scale is
    logarithmic in the distance from 1, as most values are close to it.

    Args:
        rows (Rows): ``series, layer, step, value``.
        series (Sequence[str]): Titles of the panels.

    Returns:
        Figure: A heat map per series, on one scale.
    """
    with style.figure_style():
        layers = style.unique(rows, 'layer')
        height = min(max(0.13 * len(layers) + 0.6, 1.3), 3.2)
        figure, grid, panels = style.facet_panels(
            series, _COLUMNS, height, sharex=True, sharey=True
        )
        norm = _decay_scale(columns(rows, 'value')[0])
        for axes, name in panels:
            chosen = select(rows, series=name)
            axes.set_title(name)
            axes.spines[:].set_visible(False)
            if chosen:
                _draw_decay(axes, chosen, layers, norm)
            else:
                style.say_empty(axes)
        _label_layers(grid, layers)
        figure.supxlabel('training iteration', fontsize=8)
        figure.supylabel('layer and direction', fontsize=8)
        scale = matplotlib.cm.ScalarMappable(norm, _decay_colors())
        bar = figure.colorbar(
            scale, ax=grid, extend='both', shrink=0.9, pad=0.02
        )
        bar.set_label('max |exp(ΔA)| \N{MINUS SIGN} 1')
        bar.set_ticks(_decay_ticks(norm))
    return figure


def _decay_scale(values: Any) -> SymLogNorm:
    far = np.abs(values[np.isfinite(values)] - 1)
    largest = float(np.quantile(far, 0.99)) if far.size else 1.0
    # three powers of ten around zero, not below the rounding of float32
    largest = 10.0 ** math.ceil(math.log10(min(max(largest, 1e-3), 10.0)))
    smallest = min(largest / 1e3, 1e-3)
    return SymLogNorm(smallest, vmin=-largest, vmax=largest)


def _decay_ticks(norm: SymLogNorm) -> list[float]:
    largest = float(norm.vmax or 1.0)
    count = round(math.log10(largest / norm.linthresh)) + 1
    powers = [largest / 10**i for i in range(count)]
    return [-x for x in powers] + [0.0] + powers[::-1]


def _decay_colors() -> Any:
    return matplotlib.colormaps['RdBu_r'].with_extremes(bad=_ABSENT)


def _draw_decay(
    axes: Axes, rows: Rows, layers: Sequence[str], norm: Normalize
) -> None:
    """Heat map of one series."""
    steps = sorted({row['step'] for row in rows})
    values = np.full((len(layers), len(steps)), np.nan)
    column = {step: i for i, step in enumerate(steps)}
    line = {layer: i for i, layer in enumerate(layers)}
    for row in rows:
        values[line[row['layer']], column[row['step']]] = row['value']
    axes.set_facecolor(_ABSENT)  # also after the last record
    values[np.isposinf(values)] = 1e30  # beyond the scale, not absent
    values -= 1
    axes.pcolormesh(
        _edges(steps),
        np.arange(len(layers) + 1) - 0.5,
        values,
        cmap=_decay_colors(),
        norm=norm,
        rasterized=True,
    )
    style.tidy_steps(axes)


def _edges(steps: Sequence[float]) -> Any:
    """Borders between steps, halfway."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (np.array(steps[1:]) + np.array(steps[:-1])) / 2
    first, last = 2 * steps[0] - middle[0], 2 * steps[-1] - middle[-1]
    return np.concatenate([[first], middle, [last]])


def _label_layers(grid: Any, layers: Sequence[str]) -> None:
    """Names on the left, at most a dozen of them; the first layer on top."""
    stride = max(1, math.ceil(len(layers) / 12))
    places = range(0, len(layers), stride)
    for axes in grid[:, 0]:
        axes.set_yticks(places, [layers[i] for i in places])
    grid[0, 0].set_ylim(len(layers) - 0.5, -0.5)
