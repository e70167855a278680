"""Curves and times of trainings, from what MMEngine logged.

plot_curve LOG ...: chosen values over the iterations, a line per log.
cal_train_time LOG ...: seconds per iteration, by epoch and on average.
list LOG ...: names of all values, how many there are, first and last.

A LOG is a ``scalars.json``, the folder of one run with its ``vis_data``, or a
work dir: its runs are joined, where a resumed one replaces what an earlier
one had logged beyond the checkpoint.

The commands are those of MMPretrain's tool of this name. That one takes
what follows the first line for like it, so it finds no score where the first
line that is not of the training is the stability monitor's; it knows neither
work dirs nor values that are not finite.
"""

import argparse
import difflib
import fnmatch
import itertools
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from mmengine.utils import mkdir_or_exist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmstabvim.ablation import results
from mmstabvim.engine import launch
from mmstabvim.reporting import style
from mmstabvim.reporting.tables import to_csv

Line = dict[str, Any]
Row = dict[str, Any]

TRAIN, VAL, HOOK = 'train', 'val', 'hook'
"""Kinds of lines; hooks write some of their own, as the monitor does."""

NO_VALUES = ('step', 'epoch', 'iter')
SHOWN = 12  # of the names that a message lists
LISTED = 14  # of the lines that a legend names
FEW = 30  # points that are marked


class Log(NamedTuple):
    """What was logged by one training.

    Attributes:
        name (str): For people.
        lines (dict[str, list[dict]]): By kind, in the order of the steps.
        runs (int): How many were joined.
    """

    name: str
    lines: dict[str, list[Line]]
    runs: int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    plot = commands.add_parser('plot_curve', help='draw curves')
    plot.add_argument('logs', nargs='+', metavar='LOG')
    plot.add_argument(
        '--keys',
        nargs='+',
        default=['loss'],
        help='a panel each; patterns such as "stab/*/horizon" draw all '
        'that they match into one (default: loss)',
    )
    plot.add_argument('--legend', nargs='+', help='a name for each LOG')
    plot.add_argument('--title', default='', help='above the panels')
    plot.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/curves'),
        metavar='PATH',
        help='for PATH.png, .pdf, .svg and .csv (default: %(default)s)',
    )
    times = commands.add_parser('cal_train_time', help='measure speed')
    times.add_argument('logs', nargs='+', metavar='LOG')
    times.add_argument(
        '--include-outliers',
        action='store_true',
        help='count the first line of each epoch, in which workers start',
    )
    times.add_argument(
        '--out', type=Path, metavar='FILE', help='CSV of the epochs'
    )
    names = commands.add_parser('list', help='show what was logged')
    names.add_argument('logs', nargs='+', metavar='LOG')
    args = parser.parse_args(argv)
    legend = getattr(args, 'legend', None)
    if legend and len(legend) != len(args.logs):
        parser.error(
            f'--legend must have a name for each of {len(args.logs)} logs, '
            f'got {len(legend)}'
        )
    return args


# ------------------------------------------------------------------- reading


def find_runs(path: Path) -> list[Path]:
    """Files of a log, the earliest run first.

    Raises:
        FileNotFoundError: If there is none.
    """
    if path.is_dir():
        one = path / 'vis_data/scalars.json'
        found = sorted(path.glob('*/vis_data/scalars.json'))
        found = [one] if one.exists() else found
        if not found:
            raise FileNotFoundError(
                f'{path} must be a work dir or the folder of a run, but has '
                'no vis_data/scalars.json'
            )
        return found
    launch.check_file(str(path), 'log')
    return [path]


def kind_of(line: Line) -> str:
    """What wrote a line: training, validation, or a hook."""
    if 'iter' in line:
        return TRAIN
    # the time of a validation is logged with its score
    return VAL if 'data_time' in line else HOOK


def read_run(path: Path) -> dict[str, list[Line]]:
    """Lines of a file by kind, but for those without a step."""
    lines: dict[str, list[Line]] = {TRAIN: [], VAL: [], HOOK: []}
    for line in results.read_lines(path):
        if 'step' in line:
            lines[kind_of(line)].append(line)
    return lines


def join(old: dict[str, list[Line]], new: dict[str, list[Line]]) -> None:
    """Append a later run; drop what it repeats, in place.

    It starts behind its checkpoint: an earlier one that went further was
    killed, and its last lines belong to no model.
    """
    if new[TRAIN]:
        first = new[TRAIN][0]
        # validations count epochs where the training does
        starts = {
            TRAIN: first['step'],
            HOOK: first['step'],
            VAL: first.get('epoch', first['step']),
        }
        for kind, start in starts.items():
            if new[kind]:
                start = min(start, new[kind][0]['step'])
            kept = [line for line in old[kind] if line['step'] < start]
            old[kind] = kept
    for kind, lines in new.items():
        old[kind] += lines


def read_log(path: Path, name: str | None = None) -> Log:
    """Read a log.

    Args:
        path (Path): File, folder of a run, or work dir.
        name (str, optional): For people. Defaults to None, for the folder's.

    Returns:
        Log: With at least one line.

    Raises:
        FileNotFoundError: If there is no such log.
        ValueError: If nothing was logged in it.
    """
    runs = find_runs(path)
    lines: dict[str, list[Line]] = {TRAIN: [], VAL: [], HOOK: []}
    for run in runs:
        join(lines, read_run(run))
    if not any(lines.values()):
        raise ValueError(f'{path} must have logged values, got none')
    return Log(name or _name(path), lines, len(runs))


def _name(path: Path) -> str:
    """Name of the work dir or run, not of what every run has."""
    if path.is_file() and path.parent.name == 'vis_data':
        path = path.parent.parent
    return path.resolve().name


def read_logs(args: argparse.Namespace, progress: Progress) -> list[Log]:
    """All logs of the command line, names made distinct."""
    names = getattr(args, 'legend', None) or [None] * len(args.logs)
    logs = []
    for path, name in zip(
        progress.track(args.logs, description='logs'), names, strict=True
    ):
        log = read_log(Path(path), name)
        count = sum(log.name == other.name for other in logs)
        if count and not name:
            log = log._replace(name=f'{log.name} ({path})')
        logs.append(log)
    return logs


# -------------------------------------------------------------------- curves


def keys_of(log: Log) -> dict[str, str]:
    """Names of what was logged, with the kind of line that has them."""
    found: dict[str, str] = {}
    for kind in (HOOK, VAL, TRAIN):  # of equal names the training's
        for line in log.lines[kind]:
            found.update(
                dict.fromkeys((k for k in line if k not in NO_VALUES), kind)
            )
    return found


def choose(log: Log, pattern: str) -> list[str]:
    """Names that a key of the command line means.

    Raises:
        ValueError: With near names, if there is none.
    """
    known = sorted(keys_of(log))
    found = [pattern] if pattern in known else fnmatch.filter(known, pattern)
    if found:
        return found
    near = difflib.get_close_matches(pattern, known, 3, 0.5)
    short = [name for name in known if name.count('/') < 2][:SHOWN]
    raise ValueError(
        f'--keys: {log.name} has no {pattern!r}; '
        + (f'near names: {", ".join(near)}; ' if near else '')
        + f'it has {len(known)} names, such as {", ".join(short)}'
    )


def epoch_length(log: Log) -> int | None:
    """Iterations of an epoch, None where steps of validations are such.

    From the logged lines, so too small by less than the interval of logging
    where the last iteration of an epoch was never logged.
    """
    epochs = [line for line in log.lines[TRAIN] if 'epoch' in line]
    if not epochs:
        return None
    return max(math.ceil(line['step'] / line['epoch']) for line in epochs)


def series(log: Log, key: str) -> list[tuple[float, float]]:
    """Iterations and values of a name, in order."""
    kind = keys_of(log)[key]
    length = epoch_length(log) if kind == VAL else None
    return [
        (line['step'] * (length or 1), float(line[key]))
        for line in log.lines[kind]
        if isinstance(line.get(key), (int, float))
    ]


def short_names(keys: Sequence[str]) -> list[str]:
    """What tells names apart: without the words that all begin or end with."""
    split = [re.split(r'([./])', key) for key in keys]
    if len(keys) < 2:
        return list(keys)
    first = count_equal(split)
    last = count_equal([words[first:][::-1] for words in split])
    return [
        ''.join(words[first : len(words) - last]).strip('./')
        for words in split
    ]


def count_equal(lists: Sequence[Sequence[str]]) -> int:
    """How many words all lists begin with."""
    columns = zip(*lists, strict=False)
    same = itertools.takewhile(lambda words: len(set(words)) == 1, columns)
    return sum(1 for _ in same)


def make_curves(
    logs: Sequence[Log], patterns: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """What to draw, and remarks on what is not finite.

    Args:
        logs (Sequence[Log]): From top to bottom in the legend.
        patterns (Sequence[str]): As ``--keys``.

    Returns:
        tuple[list[dict], list[str]]: Rows ``panel, series, log, key, step,
        value``, and sentences.
    """
    rows: list[Row] = []
    remarks = []
    for pattern in patterns:
        for log in logs:
            keys = choose(log, pattern)
            for key, short in zip(keys, short_names(keys), strict=True):
                title = log.name if key == pattern else f'{log.name}, {short}'
                points = series(log, key)
                rows += [
                    dict(panel=pattern, series=title, log=log.name)
                    | dict(key=key, step=step, value=value)
                    for step, value in points
                ]
                bad = [s for s, value in points if not math.isfinite(value)]
                if bad:
                    remarks.append(
                        f'{log.name}: {key} is not finite in {len(bad)} of '
                        f'{len(points)} lines, first at iteration {bad[0]:g}'
                    )
    return rows, remarks


def draw(rows: Sequence[Row], title: str) -> Figure:
    """A panel for each key; a cross before what is not finite."""
    panels = style.unique(rows, 'panel')
    with style.figure_style():
        figure, grid = style.panels(len(panels), 1, 1.9, sharex=True)
        figure.set_figwidth(style.WIDTH)
        grid[0, 0].set_title(title)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            chosen = [row for row in rows if row['panel'] == panel]
            draw_panel(axes, chosen)
            axes.set_ylabel(panel)
        grid[-1, 0].set_xlabel('iteration')
        style.tidy_steps(grid[-1, 0])
    return figure


def draw_panel(axes: Any, rows: Sequence[Row]) -> None:
    """Lines, their legend at the side."""
    names = style.unique(rows, 'series')
    for number, name in enumerate(names):
        own = [row for row in rows if row['series'] == name]
        steps, values = (
            np.array([row[key] for row in own], float)
            for key in ('step', 'value')
        )
        finite = np.isfinite(values)
        look = style.line_style(number) | dict(linewidth=1.1)
        # a gap where it is not finite
        shown = np.where(finite, values, np.nan)
        few = len(own) <= FEW
        label = name if number < LISTED else '_'
        axes.plot(
            steps, shown, '.' if few else '', label=label, markersize=4, **look
        )
        ends = np.flatnonzero(finite[:-1] & ~finite[1:])
        axes.plot(steps[ends], values[ends], 'x', color=look['color'])
    if len(names) > LISTED:
        axes.plot([], [], ' ', label=f'and {len(names) - LISTED} more')
    values = np.array([row['value'] for row in rows], float)
    values = values[np.isfinite(values)]
    if len(values):
        style.scale(axes, values)
    else:
        style.say_empty(axes)
    axes.grid()
    axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), fontsize=6)


def plot_curve(args: argparse.Namespace, progress: Progress) -> None:
    """Draw, write, and say where something was not finite."""
    rows, remarks = make_curves(read_logs(args, progress), args.keys)
    figure = draw(rows, args.title)
    mkdir_or_exist(args.out.resolve().parent)
    known = args.out.suffix in ('.png', '.pdf', '.svg', '.csv')
    base = args.out.with_suffix('') if known else args.out
    style.save(figure, base)
    data = [
        {k: row[k] for k in ('log', 'key', 'step', 'value')} for row in rows
    ]
    base.with_suffix('.csv').write_text(to_csv(data), encoding='utf-8')
    for remark in remarks:
        print(remark)
    print(f'Written: {base}.png, .pdf, .svg, .csv')


# --------------------------------------------------------------------- times


def epoch_times(log: Log, include_outliers: bool = False) -> list[Row]:
    """Mean seconds of an iteration in each epoch.

    Args:
        log (Log): With lines of a training.
        include_outliers (bool): Count the first line of an epoch that has
            several. Defaults to False.

    Returns:
        list[dict]: ``log, epoch, lines, time, data_time``; of a training
        that counts iterations one row, of epoch 1. Where MMEngine smoothes
        times (its default) these are means of means over its window.

    Raises:
        ValueError: If no time was logged.
    """
    groups: dict[int, list[Line]] = {}
    for line in log.lines[TRAIN]:
        if isinstance(line.get('time'), (int, float)):
            groups.setdefault(line.get('epoch', 1), []).append(line)
    if not groups:
        raise ValueError(f'{log.name} must have logged times, got none')
    rows = []
    for epoch, lines in groups.items():
        chosen = lines if include_outliers else lines[1:] or lines
        rows.append(
            dict(
                log=log.name,
                epoch=epoch,
                lines=len(chosen),
                time=statistics.fmean(line['time'] for line in chosen),
                data_time=statistics.fmean(
                    line.get('data_time', math.nan) for line in chosen
                ),
            )
        )
    return rows


def summarize_times(log: Log, rows: Sequence[Row]) -> Row:
    """What the epochs say together."""
    times = [row['time'] for row in rows]
    count = sum(row['lines'] for row in rows)
    mean = sum(row['time'] * row['lines'] for row in rows) / count
    data = sum(row['data_time'] * row['lines'] for row in rows) / count
    steps = [line['step'] for line in log.lines[TRAIN]]
    return {
        'log': log.name,
        'runs': log.runs,
        'iterations': max(steps),
        'mean, s': mean,
        'loading, s': data,
        'fastest epoch': f'{rows[times.index(min(times))]["epoch"]}',
        'its mean, s': min(times),
        'slowest epoch': f'{rows[times.index(max(times))]["epoch"]}',
        'its mean, s ': max(times),
        'spread of epochs, s': statistics.pstdev(times),
    }


def cal_train_time(args: argparse.Namespace, progress: Progress) -> None:
    """Print how long iterations took; write it by epoch."""
    rows: list[Row] = []
    found = []
    for log in read_logs(args, progress):
        own = epoch_times(log, args.include_outliers)
        found.append(summarize_times(log, own))
        rows += own
    show('seconds per iteration', found)
    if args.out:
        mkdir_or_exist(args.out.resolve().parent)
        args.out.write_text(to_csv(rows), encoding='utf-8')
        print(f'Written: {args.out}')


# ---------------------------------------------------------------------- names


def list_names(args: argparse.Namespace, progress: Progress) -> None:
    """Print what was logged."""
    for log in read_logs(args, progress):
        rows = []
        for key, kind in sorted(keys_of(log).items()):
            points = series(log, key)
            if not points:
                continue
            bad = sum(not math.isfinite(value) for _, value in points)
            rows.append(
                {
                    'name': key,
                    'of': kind,
                    'values': len(points),
                    'not finite': bad,
                    'first': points[0][1],
                    'last': points[-1][1],
                }
            )
        show(f'{log.name}, {log.runs} runs', rows)


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table."""
    table = Table(title=title)
    for name, value in rows[0].items():
        side = 'left' if isinstance(value, str) else 'right'
        table.add_column(name, justify=side, overflow='fold')
    for row in rows:
        table.add_row(
            *(
                f'{v:.4g}' if isinstance(v, float) else str(v)
                for v in row.values()
            )
        )
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table, markup=False)


COMMANDS = dict(
    plot_curve=plot_curve, cal_train_time=cal_train_time, list=list_names
)


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    args = parse_args(argv)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress(console=console, transient=True) as progress:
        COMMANDS[args.command](args, progress)


if __name__ == '__main__':
    main()
