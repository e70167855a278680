"""Common style of all figures: sizes, colours, legends, file formats."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

WIDTH = 7.2  # inches, a page of text
DPI = 200
FORMATS = ('png', 'pdf', 'svg')

Rows = Sequence[dict[str, Any]]
"""Marks of a figure: one dict each, with the columns that it names."""

# Okabe and Ito's colours, which stay apart for colour-blind eyes, wine
# instead of their yellow, which is lost on white.
COLORS = (
    '#000000',
    '#E69F00',
    '#56B4E9',
    '#009E73',
    '#882255',
    '#0072B2',
    '#D55E00',
    '#CC79A7',
)
# so that colour is not the only difference
DASHES: tuple[Any, ...] = ('-', '-', '-', '-', '--', '--', '--', '-.')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')
GREY = '#595959'

_SETTINGS = {
    'font.size': 8,
    'font.family': 'DejaVu Sans',
    'axes.titlesize': 8,
    'axes.labelsize': 8,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.6,
    'axes.axisbelow': True,
    'grid.linewidth': 0.4,
    'grid.color': '#DDDDDD',
    'xtick.labelsize': 7,
    'ytick.labelsize': 7,
    'xtick.major.width': 0.6,
    'ytick.major.width': 0.6,
    'legend.fontsize': 7.5,
    'legend.frameon': False,
    'lines.linewidth': 1.2,
    'pdf.fonttype': 42,  # letters stay letters
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Apply the style, and restore matplotlib's settings afterwards."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def panels(
    rows: int, columns: int, height: float, **options: Any
) -> tuple[Figure, Any]:
    """A figure of panels, without the global state of pyplot.

    Args:
        rows (int): Panels below one another.
        columns (int): Panels beside one another.
        height (float): Of one row, in inches.
        options (Any): For ``Figure.subplots``.

    Returns:
        tuple[Figure, ndarray]: Figure and its axes, two-dimensional.
    """
    # a lone panel needs no full line
    width = WIDTH if columns > 1 else 0.72 * WIDTH
    figure = Figure((width, height * rows + 0.35), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def facet_panels(
    facets: Sequence[Any], most: int, height: float, **options: Any
) -> tuple[Figure, Any, list[tuple[Axes, Any]]]:
    """Make a panel per facet, in lines that are as even as they can be.

    Args:
        facets (Sequence[Any]): Names, for instance.
        most (int): Panels in a line.
        height (float): Of one line, in inches.
        **options (Any): For ``Figure.subplots``.

    Returns:
        tuple[Figure, ndarray, list[tuple[Axes, Any]]]: Figure, all axes, and
        pairs of axes and facet.
    """
    lines, columns = rows_and_columns(len(facets), most)
    figure, grid = panels(lines, columns, height, **options)
    used = hide_rest(grid, len(facets))
    return figure, grid, list(zip(used, facets, strict=True))


def rows_and_columns(count: int, most: int) -> tuple[int, int]:
    """Arrange panels in lines that are as even as they can be.

    Args:
        count (int): Of panels.
        most (int): Panels in a line.

    Returns:
        tuple[int, int]: Lines, and panels in each; of five panels, at most
        four in a line, three and two.
    """
    lines = max(1, math.ceil(count / most))
    return lines, max(1, math.ceil(count / lines))


def hide_rest(grid: Any, count: int) -> list[Axes]:
    """Hide panels that are left over, and write the ticks above them.

    Args:
        grid (ndarray): Axes, two-dimensional, of :func:`panels`.
        count (int): How many are used.

    Returns:
        list[Axes]: Those.
    """
    axes = list(grid.flat)
    for i, rest in enumerate(axes[count:], count):
        rest.set_visible(False)
        if i >= grid.shape[1]:
            axes[i - grid.shape[1]].tick_params(labelbottom=True)
    return axes[:count]


def save(
    figure: Figure,
    path: Path,
    formats: Sequence[str] = FORMATS[:1],
    dpi: float = DPI,
) -> None:
    """Write a figure; equal figures give equal files.

    Args:
        figure (Figure): The figure.
        path (Path): Without ending.
        formats (Sequence[str]): Endings, of ``'png'``, ``'pdf'`` and
            ``'svg'``. Defaults to PNG alone.
        dpi (float): Pixels per inch of the PNG file. Defaults to 200.
    """
    # without dates, and with names inside the SVG that are not random
    metadata: dict[str, dict[str, None]] = dict(
        png={}, pdf=dict(CreationDate=None, ModDate=None), svg=dict(Date=None)
    )
    options = {'svg.hashsalt': path.name, 'savefig.dpi': dpi}
    with figure_style(), matplotlib.rc_context(options):
        for ending in formats:
            figure.savefig(
                path.with_suffix(f'.{ending}'), metadata=metadata[ending]
            )


def unique(rows: Iterable[dict[str, Any]], name: str) -> list[Any]:
    """Values of a column in the order in which they appear.

    Args:
        rows (Iterable[dict[str, Any]]): Rows of a figure.
        name (str): The column.

    Returns:
        list[Any]: Without repetition.

    Example:
        >>> unique([dict(x=2), dict(x=1), dict(x=2)], 'x')
        [2, 1]
    """
    return list(dict.fromkeys(row[name] for row in rows))


def select(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    """Rows whose columns have the given values, in their order.

    Args:
        rows (Rows): Rows of a figure.
        **wanted (Any): Value by column.

    Returns:
        list[dict[str, Any]]: The rows themselves, not copies.

    Example:
        >>> select([dict(x=2, y=0), dict(x=1, y=0)], x=1)
        [{'x': 1, 'y': 0}]
    """
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def columns(rows: Rows, *names: str) -> list[np.ndarray]:
    """Numbers of some columns; None is NaN.

    Args:
        rows (Rows): Rows of a figure.
        *names (str): The columns.

    Returns:
        list[ndarray]: (rows,) each, float64.
    """
    return [np.array([row[name] for row in rows], float) for name in names]


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of a series.

    Args:
        number (int): Its place in the legend; from the ninth on colours
            repeat.

    Returns:
        dict[str, Any]: Keyword arguments of ``plot``.
    """
    count = len(COLORS)
    return dict(
        color=COLORS[number % count],
        linestyle=DASHES[number % count],
        # the first is usually the baseline, which others may lie upon
        linewidth=1.1 if number else 2.4,
        zorder=2.5 if number else 2,
    )


def marker(number: int) -> str:
    """Marker of a series, by its place in the legend."""
    return MARKERS[number % len(MARKERS)]


def handle(**options: Any) -> Line2D:
    """Entry of a legend, drawn as ``plot`` draws with these options."""
    return Line2D([], [], **options)


def add_legend(
    figure: Figure,
    series: Sequence[str],
    title: str,
    markers: bool = False,
    border: str = '',
) -> None:
    """Put a legend below the panels, where it covers nothing.

    Args:
        figure (Figure): The figure.
        series (Sequence[str]): Names in their order.
        title (str): Their meaning.
        markers (bool): Show the markers of the lines. Defaults to False.
        border (str): Name of the dotted line. Defaults to none.
    """
    lines = [
        handle(
            **line_style(i),
            marker=marker(i) if markers else '',
            markersize=3.5,
        )
        for i in range(len(series))
    ]
    if border:
        lines.append(handle(color=GREY, lw=0.8, ls=':'))
    names = [*series, border] if border else series
    legend_below(figure, lines, names, title)


def legend_below(
    figure: Figure,
    handles: Sequence[Any],
    names: Sequence[str],
    title: str = '',
) -> None:
    """Put a legend with given entries below the panels.

    Args:
        figure (Figure): The figure.
        handles (Sequence[Any]): Drawn in front of the names.
        names (Sequence[str]): In their order.
        title (str): Their meaning. Defaults to none.
    """
    columns = 8 if figure.get_figwidth() == WIDTH else 4
    figure.legend(
        handles,
        names,
        loc='outside lower center',
        ncols=min(len(names), columns),
        handlelength=2.2,
        columnspacing=1.4,
        title=title or None,
        title_fontsize=7.5,
    )


def draw_border(axes: Axes, value: float | None, dashes: str = '--') -> None:
    """Draw a grey line across a panel; nothing for None."""
    if value is not None:
        axes.axhline(value, color=GREY, lw=0.8, ls=dashes)


def tidy_steps(axes: Axes) -> None:
    """Few, whole numbers on an axis of training steps."""
    axes.xaxis.set_major_locator(
        matplotlib.ticker.MaxNLocator(4, integer=True, min_n_ticks=2)
    )


def say_empty(axes: Axes) -> None:
    """Write "no data" into a panel."""
    axes.text(
        0.5,
        0.5,
        'no data',
        transform=axes.transAxes,
        ha='center',
        va='center',
        color=GREY,
    )


def scale(axes: Axes, values: np.ndarray) -> None:
    """Make the vertical axis logarithmic if its values span magnitudes.

    Args:
        axes (Axes): Changed in place.
        values (ndarray): Everything on it; with values below zero the axis
            is linear around zero.
    """
    sizes = np.abs(values)
    typical, largest = np.median(sizes), sizes.max()
    if values.min() > 0 and largest > 10 * values.min():
        axes.set_yscale('log')
        if largest < 100 * values.min():  # powers of ten are too few
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FormatStrFormatter('%g'))
            axes.yaxis.set_minor_locator(NullLocator())
    elif values.min() <= 0 and largest > 50 * typical > 0:
        axes.set_yscale('symlog', linthresh=float(typical))
