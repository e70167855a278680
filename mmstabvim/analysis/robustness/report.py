"""Tables and a figure of sweeps, condensed over seeds."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mmstabvim.ablation.statistics import sample
from mmstabvim.analysis.robustness.evaluate import Rows, Sweep
from mmstabvim.evaluation.robustness_summary import (
    by_frequency,
    score_name,
    summarize,
)
from mmstabvim.reporting import (
    Table,
    render,
    style,
    to_csv,
    to_latex,
    to_markdown,
)
from mmstabvim.visualization import Quantity, robustness_figure

UNITS = {
    'top1': 'top-1 accuracy (%)',
    'mIoU': 'mean IoU (%)',
    'flip_rate': 'flip rate (%)',
    'logit_shift': 'logit shift',
}
"""Measured quantities, as axes and titles call them."""

Group = tuple[str, str]


def grouped(sweeps: Sequence[Sweep]) -> dict[Group, list[Sweep]]:
    """Group checkpoints that differ in their seed only."""
    groups: dict[Group, list[Sweep]] = {}
    for item in sweeps:
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


def quantities_of(sweeps: Sequence[Sweep]) -> list[str]:
    """Score, flip rate and logit shift."""
    return [score_name(sweeps[0].rows), 'flip_rate', 'logit_shift']


def mode_rows(sweeps: Sequence[Sweep]) -> Rows:
    """Condense each quantity over frequency, over seeds.

    Args:
        sweeps (Sequence[Sweep]): All checkpoints.

    Returns:
        list[dict]: ``quantity, facet, series, x, n, mean, low, high``.

    Raises:
        ValueError: If seeds have different frequencies.
    """
    rows = []
    for (facet, series), items in grouped(sweeps).items():
        courses = [by_frequency(item.rows) for item in items]
        for name in quantities_of(sweeps):
            for points in zip(*courses, strict=True):
                places = {point['frequency'] for point in points}
                if len(places) > 1:
                    raise ValueError(
                        'all seeds must have the same frequencies, got '
                        f'{sorted(places)}'
                    )
                place = dict(facet=facet, series=series, x=places.pop())
                found = condense([point[name] for point in points])
                rows.append(dict(quantity=name, **place, **found))
    return rows


def other_rows(sweeps: Sequence[Sweep]) -> Rows:
    """Condense clean images and corruptions over seeds.

    Args:
        sweeps (Sequence[Sweep]): All checkpoints.

    Returns:
        list[dict]: ``quantity, facet, series, name, n, mean, low, high``.
    """
    rows = []
    for (facet, series), items in grouped(sweeps).items():
        for name in quantities_of(sweeps):
            for kind in kinds_of(sweeps):
                found = condense(
                    [
                        row[name]
                        for item in items
                        for row in item.rows
                        if row['kind'] == kind
                    ]
                )
                place = dict(facet=facet, series=series, name=kind)
                rows.append(dict(quantity=name, **place, **found))
    return rows


def kinds_of(sweeps: Sequence[Sweep]) -> list[str]:
    """Clean images and corruptions, without Fourier modes."""
    kinds = [row['kind'] for row in sweeps[0].rows]
    return [kind for kind in kinds if kind != 'fourier']


def make_figure(sweeps: Sequence[Sweep], label: str) -> Figure:
    """Draw everything over frequency, and the corruptions."""
    series = list(dict.fromkeys(item.series for item in sweeps))
    return robustness_figure(
        mode_rows(sweeps),
        other_rows(sweeps),
        series,
        label,
        [Quantity(name, UNITS[name]) for name in quantities_of(sweeps)],
    )


def _text(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    found = sample(list(values))
    if found.n < 2:
        return f'{found.mean:.{digits}f}'
    return f'{found.mean:.{digits}f} ± {found.std:.{digits}f}'


def quantity_table(name: str, sweeps: Sequence[Sweep], label: str) -> Table:
    """Tabulate one quantity: clean, Fourier modes, corruptions.

    Args:
        name (str): Key of ``UNITS``.
        sweeps (Sequence[Sweep]): All checkpoints.
        label (str): Meaning of the series.

    Returns:
        Table: A line for each group of seeds.
    """
    score = score_name(sweeps[0].rows)
    digits = 3 if name == 'logit_shift' else 1
    kinds = kinds_of(sweeps)[1:]  # the first is clean
    fourier = [f'fourier_{name}_mean', f'fourier_{name}_worst']
    keys = [*fourier, *(f'{kind}_{name}' for kind in kinds)]
    heads = ['modes, mean', 'worst mode', *kinds]
    if name == score:
        keys.insert(0, f'clean_{score}')
        heads.insert(0, 'clean')
    lines, data = [], []
    for (facet, series), items in grouped(sweeps).items():
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


def write(
    sweeps: Sequence[Sweep],
    folder: Path,
    label: str = 'model',
    words: str = '',
    formats: Sequence[str] = (),
) -> str:
    """Write robustness.md and .png, CSV and LaTeX.

    Args:
        sweeps (Sequence[Sweep]): All checkpoints.
        folder (Path): Created where it is missing.
        label (str): Meaning of the series. Defaults to ``'model'``.
        words (str): Description of the sweep. Defaults to none.
        formats (Sequence[str]): Of the figure besides PNG. Defaults to none.

    Returns:
        str: The tables as Markdown, for a terminal.

    Example:
        >>> sweep = Sweep('', 'vim', None, rows)  # doctest: +SKIP
        >>> write([sweep], Path('robustness'))  # doctest: +SKIP
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure = make_figure(sweeps, label)
    style.save(figure, folder / 'robustness', ('png', *formats))
    names = quantities_of(sweeps)
    tables = [quantity_table(name, sweeps, label) for name in names]
    modes, others = mode_rows(sweeps), other_rows(sweeps)
    single = [
        dict(facet=i.facet, series=i.series, seed=i.seed, **row)
        for i in sweeps
        for row in i.rows
    ]
    files = {f'{table.name}.tex': to_latex(table) for table in tables}
    files['summary.csv'] = to_csv(tables[0].data)
    files['modes.csv'], files['others.csv'] = to_csv(modes), to_csv(others)
    files['all.csv'] = to_csv(single)
    files['robustness.md'] = render(
        'robustness.md', words=words, tables=tables
    )
    for name, text in files.items():
        (folder / name).write_text(text, encoding='utf-8')
    return '\n\n'.join(f'{t.title}\n{to_markdown(t)}' for t in tables)
