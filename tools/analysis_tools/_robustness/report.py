"""Tables and a figure of sweeps, condensed over seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from _robustness.evaluate import Measured, Rows
from mmstabvim.ablation.statistics import sample
from mmstabvim.evaluation.robustness_summary import (
    by_frequency,
    score_name,
    summarize,
)
from mmstabvim.reporting.tables import Table, to_csv, to_latex, to_markdown
from mmstabvim.visualization import robustness_figure, style
from mmstabvim.visualization.curves import Quantity

UNITS = {
    'top1': 'top-1 accuracy (%)',
    'mIoU': 'mean IoU (%)',
    'flip_rate': 'flip rate (%)',
    'logit_shift': 'logit shift',
}
"""What is measured, as axes and titles call it."""

Group = tuple[str, str]


def grouped(measured: Sequence[Measured]) -> dict[Group, list[Measured]]:
    """Checkpoints that differ in their seed only, in their order."""
    groups: dict[Group, list[Measured]] = {}
    for item in measured:
        groups.setdefault((item.facet, item.series), []).append(item)
    return groups


def condense(values: Sequence[float]) -> dict[str, float]:
    """Mean, and one standard deviation to each side if there are several."""
    found = sample(list(values))
    spread = found.std if found.n > 1 else 0.0
    return dict(
        n=found.n,
        mean=found.mean,
        low=found.mean - spread,
        high=found.mean + spread,
    )


def quantities_of(measured: Sequence[Measured]) -> list[str]:
    """Score, flip rate and logit shift."""
    return [score_name(measured[0].rows), 'flip_rate', 'logit_shift']


def mode_rows(measured: Sequence[Measured]) -> Rows:
    """Of each quantity the course over frequency, condensed over seeds."""
    rows = []
    for (facet, series), items in grouped(measured).items():
        courses = [by_frequency(item.rows) for item in items]
        for name in quantities_of(measured):
            for points in zip(*courses, strict=True):
                places = {point['frequency'] for point in points}
                if len(places) > 1:
                    raise ValueError(
                        'all seeds must have the same frequencies, got '
                        f'{sorted(places)}'
                    )
                rows.append(
                    dict(
                        quantity=name,
                        facet=facet,
                        series=series,
                        x=places.pop(),
                        **condense([point[name] for point in points]),
                    )
                )
    return rows


def other_rows(measured: Sequence[Measured]) -> Rows:
    """Clean images and corruptions, condensed over seeds."""
    kinds = [
        row['kind'] for row in measured[0].rows if row['kind'] != 'fourier'
    ]
    rows = []
    for (facet, series), items in grouped(measured).items():
        for name in quantities_of(measured):
            for kind in kinds:
                values = [
                    row[name]
                    for item in items
                    for row in item.rows
                    if row['kind'] == kind
                ]
                rows.append(
                    dict(
                        quantity=name,
                        facet=facet,
                        series=series,
                        name=kind,
                        **condense(values),
                    )
                )
    return rows


def make_figure(measured: Sequence[Measured], label: str) -> Figure:
    """Everything over frequency, and the corruptions."""
    series = list(dict.fromkeys(item.series for item in measured))
    return robustness_figure(
        mode_rows(measured),
        other_rows(measured),
        series,
        label,
        [Quantity(name, UNITS[name]) for name in quantities_of(measured)],
    )


def _text(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    found = sample(list(values))
    if found.n < 2:
        return f'{found.mean:.{digits}f}'
    return f'{found.mean:.{digits}f} ± {found.std:.{digits}f}'


def make_table(name: str, measured: Sequence[Measured], label: str) -> Table:
    """One quantity: clean, Fourier modes, corruptions.

    Args:
        name (str): Key of ``UNITS``.
        measured (Sequence[Measured]): All checkpoints.
        label (str): What the series are.

    Returns:
        Table: A line for each group of seeds.
    """
    score = score_name(measured[0].rows)
    digits = 3 if name == 'logit_shift' else 1
    kinds = [
        row['kind'] for row in measured[0].rows[1:] if row['kind'] != 'fourier'
    ]
    fourier = [f'fourier_{name}_mean', f'fourier_{name}_worst']
    keys = [*fourier, *(f'{kind}_{name}' for kind in kinds)]
    heads = ['modes, mean', 'worst mode', *kinds]
    if name == score:
        keys.insert(0, f'clean_{score}')
        heads.insert(0, 'clean')
    lines, data = [], []
    for (facet, series), items in grouped(measured).items():
        found = [summarize(item.rows, score) for item in items]
        keys = [key for key in keys if key in found[0]]
        where = [s.get(f'fourier_{name}_worst_frequency') for s in found]
        cells = {key: [s[key] for s in found] for key in keys}
        at = ', '.join(f'{f:.3f}' for f in where if f is not None)
        texts = [_text(values, digits) for values in cells.values()]
        lines.append([facet, series, str(len(items)), *texts, at])
        for item, one in zip(items, found, strict=True):
            data.append(
                dict(facet=facet, series=series, seed=item.seed, **one)
            )
    columns = ['', label, 'n', *heads[-len(keys) :], 'worst at']
    if not any(line[0] for line in lines):
        columns, lines = columns[1:], [line[1:] for line in lines]
    caption = (
        'Mean ± standard deviation over the n seeds; "worst at" has the '
        "frequency of each seed's worst mode, cycles per token."
    )
    align = 'l' * columns.index('n')
    align += 'r' * (len(columns) - len(align))
    return Table(name, UNITS[name], caption, columns, lines, data, align)


def write_report(
    measured: Sequence[Measured],
    label: str,
    words: str,
    out: Path,
    say: Callable[[str], Any],
) -> None:
    """Write tables, figure and their data.

    Args:
        measured (Sequence[Measured]): All checkpoints.
        label (str): What the series are.
        words (str): What was done.
        out (Path): Folder.
        say (Callable): Gets each table as Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    figure = make_figure(measured, label)
    style.save(figure, out / 'robustness')
    page = ['# Robustness', words, '![Robustness](robustness.png)']
    for name in quantities_of(measured):
        table = make_table(name, measured, label)
        text = to_markdown(table)
        page += [f'## {table.title}', text, table.caption]
        say(f'{table.title}\n{text}\n')
        (out / f'{name}.tex').write_text(to_latex(table), encoding='utf-8')
    files = {
        'summary.csv': table.data,
        'modes.csv': mode_rows(measured),
        'others.csv': other_rows(measured),
        'all.csv': [
            dict(facet=i.facet, series=i.series, seed=i.seed, **row)
            for i in measured
            for row in i.rows
        ],
    }
    for name, rows in files.items():
        (out / name).write_text(to_csv(rows), encoding='utf-8')
    text = '\n\n'.join(page) + '\n'
    (out / 'robustness.md').write_text(text, encoding='utf-8')
