"""What two models differ in."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from _stability_report.figures import (
    compared_eigenvalues,
    horizon_picture,
    series_names,
    training_pictures,
)
from _stability_report.findings import Finding
from _stability_report.measure import Measured
from _stability_report.source import finite
from _stability_report.tables import PROFILE, cell, make
from _stability_report.tensors import LIMITS, largest_shares, overflows
from _stability_report.thresholds import WORDS
from mmstabvim.ablation.layout import Picture
from mmstabvim.reporting.tables import Table

Row = dict[str, Any]

CHANGED = 1.25
"""Factor by which the value of a finding must differ to be told."""


def of_directions(
    key: str, combine: Callable[[list[float]], float]
) -> Callable[[Measured], float | None]:
    """One number of a column of the directions."""

    def read(measured: Measured) -> float | None:
        rows = measured.directions
        values = [row[key] for row in rows if row.get(key) is not None]
        return float(combine(values)) if values else None

    return read


def of_weights(
    key: str, combine: Callable[[list[float]], float]
) -> Callable[[Measured], float | None]:
    """One number of a column of the weights."""

    def read(measured: Measured) -> float | None:
        values = finite(row.get(key) for row in measured.weights)
        return float(combine(values)) if values else None

    return read


def _largest_activation(measured: Measured) -> float | None:
    rows = largest_shares(measured.tensors)
    if not rows:
        return None
    shares = [row['observed'] / LIMITS['float16'] for row in rows]
    return math.nan if any(map(math.isnan, shares)) else max(shares)


SUMMARY: dict[str, tuple[str, Callable[[Measured], float | None]]] = {
    'broken_weights': (
        'weight tensors with NaN or infinity',
        lambda m: float(len(m.broken)),
    ),
    'abscissa': ('largest Re λ (1/step)', of_directions('abscissa', max)),
    'radius': ('largest |λ| (1/step)', of_directions('radius', max)),
    'condition': (
        'largest condition of an eigenbasis',
        of_directions('condition', max),
    ),
    'decay_max': ('largest |exp(ΔA)|', of_directions('decay_max', max)),
    'growing': (
        'largest share of |exp(ΔA)| above 1',
        of_directions('growing', max),
    ),
    'horizon': (
        'median memory, median over layers (tokens)',
        of_directions('horizon_q50', statistics.median),
    ),
    'short': (
        'largest share of modes that forget within 2 tokens',
        of_directions('short', max),
    ),
    'delta_median': (
        'median Δ, median over layers',
        of_directions('delta_q50', statistics.median),
    ),
    'delta_max': ('largest Δ', of_directions('delta_max', max)),
    'skipped': (
        'largest share of skipped tokens',
        of_directions('skipped', max),
    ),
    'vanished': (
        'largest share of vanished gradients',
        of_directions('vanished', max),
    ),
    'exploding': (
        'largest share of exploding gradients',
        of_directions('exploding', max),
    ),
    'activation': (
        'largest value on the images, of float16',
        _largest_activation,
    ),
    'uncertified': (
        'layers not certified for float16',
        lambda m: float(len(overflows(m.tensors, 'float16'))),
    ),
    'sigma': ('largest norm of a weight', of_weights('sigma', max)),
    'stable_rank': (
        'smallest stable rank of a weight',
        of_weights('stable_rank', min),
    ),
}
"""Numbers that sum a model up: name, words, how they are found."""


def summarize(measured: Measured) -> dict[str, float | None]:
    """The numbers of ``SUMMARY`` and of the sensitivity, by name."""
    found = {name: read(measured) for name, (_, read) in SUMMARY.items()}
    for name in PROFILE:
        if name in measured.sensitivity:
            found[f'sensitivity_{name}'] = measured.sensitivity[name]
    curves = measured.source.training.curves
    losses = curves.series('loss')[1]
    if losses:
        found['loss'] = losses[-1]
    for name, value in (curves.metrics() or [{}])[-1].items():
        found[f'metric_{name}'] = value
    return found


def words_of(name: str) -> str:
    """A number of the summary in words."""
    if name in SUMMARY:
        return SUMMARY[name][0]
    if name.startswith('sensitivity_'):
        return PROFILE[name.removeprefix('sensitivity_')][1]
    if name == 'loss':
        return 'last logged loss'
    return f'last {name.removeprefix("metric_")}'


def summary_table(found: Sequence[Measured]) -> Table:
    """One column for each model; for two also the change."""
    columns = [summarize(measured) for measured in found]
    names = series_names(found)
    keys = dict.fromkeys(key for column in columns for key in column)
    rows: list[Row] = []
    for key in keys:
        values = [column.get(key) for column in columns]
        row = dict(quantity=words_of(key), name=key)
        row |= dict(zip(names, values, strict=True))
        if len(values) == 2:
            row['change'] = change(*values)
        rows.append(row)
    heads = dict(quantity='quantity') | {name: name for name in names}
    if len(found) == 2:
        heads['change'] = 'first over second'
    lines = [[cell(row[key], 4) for key in heads] for row in rows]
    title = 'Both in numbers' if len(found) == 2 else 'In numbers'
    return make('summary', title, '', heads, rows, lines)


def change(a: float | None, b: float | None) -> str:
    """The first over the second, or their difference."""
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
    ours: Sequence[Finding], theirs: Sequence[Finding]
) -> list[Row]:
    """What only one of them has, and what differs in size.

    Args:
        ours (Sequence[Finding]): Of the first model.
        theirs (Sequence[Finding]): Of the other one.

    Returns:
        list[Row]: ``change`` is ``'only here'``, ``'only there'``, ``'more'``
        or ``'less'``.
    """
    there = {finding.key: finding for finding in theirs}
    here = {finding.key: finding for finding in ours}
    rows = []
    for key, finding in here.items():
        other = there.get(key)
        word = 'only here' if other is None else _size(finding, other)
        if word:
            rows.append(_row(word, finding))
    rows += [
        _row('only there', finding)
        for key, finding in there.items()
        if key not in here
    ]
    return rows


def _size(ours: Finding, theirs: Finding) -> str:
    if ours.excess >= CHANGED * theirs.excess and ours.excess:
        return 'more'
    if theirs.excess >= CHANGED * ours.excess and theirs.excess:
        return 'less'
    return ''


def _row(word: str, finding: Finding) -> Row:
    return dict(
        change=word,
        severity=WORDS[finding.severity],
        text=finding.text,
        kind=finding.kind,
    )


def changed_table(rows: Sequence[Row]) -> Table:
    """At most three of a kind and change, and how many more."""
    lines = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row['change'], row['kind']), []).append(row)
    for (word, _), own in groups.items():
        severity = own[0]['severity']
        lines += [[word, severity, row['text']] for row in own[:3]]
        if len(own) > 3:
            more = f'… and {len(own) - 3} more of this kind'
            lines.append([word, severity, more])
    heads = ['change', 'severity', 'finding']
    return Table(
        'changed_findings', 'Changed findings', '', heads, lines, rows, 'lll'
    )


def compared_pictures(found: Sequence[Measured]) -> list[Picture]:
    """Eigenvalues, memory and curves of both."""
    pictures = [compared_eigenvalues(found), horizon_picture(found)]
    pictures += training_pictures(found)
    return [
        Picture(
            f'both_{picture.name}'
            if 'both' not in picture.name
            else picture.name,
            picture.title,
            picture.caption,
            picture.figure,
            picture.rows,
        )
        for picture in pictures
        if picture.rows
    ]
