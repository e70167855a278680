"""Numbers that sum a model up, and differences of two models."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mmstabvim.analysis.ranges import LIMITS, overflows
from mmstabvim.analysis.stability_report.figures import (
    compared_eigenvalues,
    horizon_picture,
    series_names,
    training_pictures,
)
from mmstabvim.analysis.stability_report.findings import (
    StabilityFinding,
    largest_shares,
)
from mmstabvim.analysis.stability_report.measure import StabilityReport
from mmstabvim.analysis.stability_report.source import finite
from mmstabvim.analysis.stability_report.tables import PROFILE
from mmstabvim.analysis.stability_report.thresholds import WORDS
from mmstabvim.reporting import Picture, Table, make_table, number

Row = dict[str, Any]

CHANGED = 1.25
"""Factor by which the value of a finding must differ to be listed."""


def _column(
    part: str, key: str, combine: Callable[[list[float]], float]
) -> Callable[[StabilityReport], float | None]:
    """Combine a column of some rows of a report."""

    def read(report: StabilityReport) -> float | None:
        found = [row.get(key) for row in getattr(report, part)]
        known = [value for value in found if value is not None]
        values = finite(known) if part == 'weights' else known
        return float(combine(values)) if values else None

    return read


def _largest_activation(report: StabilityReport) -> float | None:
    rows = largest_shares(report.tensors)
    if not rows:
        return None
    shares = [row['observed'] / LIMITS['float16'] for row in rows]
    return math.nan if any(map(math.isnan, shares)) else max(shares)


SUMMARY: dict[str, tuple[str, Callable[[StabilityReport], float | None]]] = {
    'broken_weights': (
        'weight tensors with NaN or infinity',
        lambda m: float(len(m.broken)),
    ),
    'abscissa': (
        'largest Re λ (1/step)',
        _column('directions', 'abscissa', max),
    ),
    'radius': ('largest |λ| (1/step)', _column('directions', 'radius', max)),
    'condition': (
        'largest condition of an eigenbasis',
        _column('directions', 'condition', max),
    ),
    'decay_max': (
        'largest |exp(ΔA)|',
        _column('directions', 'decay_max', max),
    ),
    'growing': (
        'largest share of |exp(ΔA)| above 1',
        _column('directions', 'growing', max),
    ),
    'horizon': (
        'median memory, median over layers (tokens)',
        _column('directions', 'horizon_q50', statistics.median),
    ),
    'short': (
        'largest share of modes that forget within 2 tokens',
        _column('directions', 'short', max),
    ),
    'delta_median': (
        'median Δ, median over layers',
        _column('directions', 'delta_q50', statistics.median),
    ),
    'delta_max': ('largest Δ', _column('directions', 'delta_max', max)),
    'skipped': (
        'largest share of skipped tokens',
        _column('directions', 'skipped', max),
    ),
    'vanished': (
        'largest share of vanished gradients',
        _column('directions', 'vanished', max),
    ),
    'exploding': (
        'largest share of exploding gradients',
        _column('directions', 'exploding', max),
    ),
    'activation': (
        'largest value on the images, of float16',
        _largest_activation,
    ),
    'uncertified': (
        'layers not certified for float16',
        lambda m: float(len(overflows(m.tensors, 'float16'))),
    ),
    'sigma': ('largest norm of a weight', _column('weights', 'sigma', max)),
    'stable_rank': (
        'smallest stable rank of a weight',
        _column('weights', 'stable_rank', min),
    ),
}
"""Numbers that sum a model up: name, words, how they are found."""


def summary_numbers(report: StabilityReport) -> dict[str, float | None]:
    """Numbers of ``SUMMARY``, sensitivity and training, by name."""
    found = {name: read(report) for name, (_, read) in SUMMARY.items()}
    for name in PROFILE:
        if name in report.sensitivity:
            found[f'sensitivity_{name}'] = report.sensitivity[name]
    curves = report.source.training.curves
    losses = curves.series('loss')[1]
    if losses:
        found['loss'] = losses[-1]
    for name, value in (curves.metrics() or [{}])[-1].items():
        found[f'metric_{name}'] = value
    return found


def words_of(name: str) -> str:
    """Describe a number of the summary."""
    if name in SUMMARY:
        return SUMMARY[name][0]
    if name.startswith('sensitivity_'):
        return PROFILE[name.removeprefix('sensitivity_')][1]
    if name == 'loss':
        return 'last logged loss'
    return f'last {name.removeprefix("metric_")}'


def summary_table(found: Sequence[StabilityReport]) -> Table:
    """Tabulate a column for each model; for two also the change."""
    columns = [summary_numbers(report) for report in found]
    names = series_names(found)
    keys = dict.fromkeys(key for column in columns for key in column)
    rows: list[Row] = []
    for key in keys:
        values = [column.get(key) for column in columns]
        row: Row = dict(quantity=words_of(key), name=key)
        row |= dict(zip(names, values, strict=True))
        if len(values) == 2:
            row['change'] = change(*values)
        rows.append(row)
    heads = dict(quantity='quantity') | {name: name for name in names}
    if len(found) == 2:
        heads['change'] = 'first over second'
    title = 'Both in numbers' if len(found) == 2 else 'In numbers'
    formats = {name: lambda value: number(value, 4) for name in names}
    return make_table('summary', title, '', heads, rows, formats, words=1)


def change(a: float | None, b: float | None) -> str:
    """Write the first over the second, or their difference."""
    if a is None or b is None:
        return ''
    if a == b:
        return 'equal'
    if math.isnan(a) or math.isnan(b):
        return ''
    if not (math.isfinite(a) and math.isfinite(b)) or a * b <= 0:
        return f'{a - b:+.3g}'
    return f'{a / b:.3g} times'


def changed_findings(
    ours: Sequence[StabilityFinding], theirs: Sequence[StabilityFinding]
) -> list[Row]:
    """List findings of one model only, and those that differ in size.

    Args:
        ours (Sequence[StabilityFinding]): Of the first model.
        theirs (Sequence[StabilityFinding]): Of the other one.

    Returns:
        list[dict]: ``change`` is ``'only here'``, ``'only there'``,
        ``'more'`` or ``'less'``.
    """
    there = {finding.key: finding for finding in theirs}
    here = {finding.key: finding for finding in ours}
    changes = [(_size(f, there.get(key)), f) for key, f in here.items()]
    changes += [
        ('only there', f) for key, f in there.items() if key not in here
    ]
    return [
        dict(
            change=word,
            severity=WORDS[finding.severity],
            text=finding.text,
            kind=finding.kind,
        )
        for word, finding in changes
        if word
    ]


def _size(ours: StabilityFinding, theirs: StabilityFinding | None) -> str:
    if theirs is None:
        return 'only here'
    if ours.excess >= CHANGED * theirs.excess and ours.excess:
        return 'more'
    if theirs.excess >= CHANGED * ours.excess and theirs.excess:
        return 'less'
    return ''


def changed_table(rows: Sequence[Row]) -> Table:
    """Tabulate at most three of a kind and change, and how many more."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row['change'], row['kind']), []).append(row)
    shown = []
    for own in groups.values():
        shown += own[:3]
        if len(own) > 3:
            more = f'… and {len(own) - 3} more of this kind'
            shown.append(dict(own[0], text=more))
    heads = dict(change='change', severity='severity', text='finding')
    title = 'Changed findings'
    return make_table('changed_findings', title, '', heads, shown, data=rows)


def compared_pictures(found: Sequence[StabilityReport]) -> list[Picture]:
    """Draw eigenvalues, memory and curves of both."""
    pictures = [compared_eigenvalues(found), horizon_picture(found)]
    pictures += training_pictures(found)
    return [
        picture
        if 'both' in picture.name
        else Picture(**{**vars(picture), 'name': f'both_{picture.name}'})
        for picture in pictures
        if picture.rows
    ]
