"""Condense the rows of a sweep: over phases, then over frequencies."""

from typing import Any

import numpy as np

Rows = list[dict[str, Any]]

SCORES = ('top1', 'mIoU')
"""Scores of classifiers and segmentors, percent; higher is better."""


def score_name(rows: Rows) -> str:
    """Find the score that the rows have.

    Args:
        rows (Rows): Rows of ``RobustnessMetric``.

    Returns:
        str: One of ``SCORES``.
    """
    return next(name for name in SCORES if name in rows[0])


def by_frequency(rows: Rows) -> Rows:
    """Average over the phases of each frequency.

    Args:
        rows (Rows): Rows of ``RobustnessMetric``.

    Returns:
        Rows: Fourier modes only, in the order of the sweep, ``frequency``
        and the measured columns.
    """
    groups: dict[Any, Rows] = {}
    for row in rows:
        if row['kind'] == 'fourier':
            groups.setdefault(row['frequency'], []).append(row)
    skip = ('kind', 'frequency', 'phase', 'images')
    return [
        dict(
            frequency=frequency,
            **{
                name: float(np.mean([row[name] for row in group]))
                for name in group[0]
                if name not in skip
            },
        )
        for frequency, group in groups.items()
    ]


def summarize(rows: Rows, score: str) -> dict[str, float]:
    """Condense rows to a few numbers of robustness.

    Args:
        rows (Rows): Rows of ``RobustnessMetric``.
        score (str): One of ``SCORES``.

    Returns:
        dict[str, float]: The clean score (``'clean_top1'``); of score, flip
        rate and logit shift the mean over frequencies, the worst one and
        where it is (``'fourier_top1_mean'``, ``'..._worst'``,
        ``'..._worst_frequency'``, of a plane wave with ``'_x'`` and
        ``'_y'``); the three numbers of each corruption. A value that is not
        a number counts as the worst.
    """
    found = {f'clean_{score}': rows[0][score]}
    names = (score, 'flip_rate', 'logit_shift')
    modes = by_frequency(rows)
    for name in names if modes else ():
        values = np.array([row[name] for row in modes])
        place = int(values.argmin() if name == score else values.argmax())
        found[f'fourier_{name}_mean'] = float(values.mean())
        found[f'fourier_{name}_worst'] = float(values[place])
        where = modes[place]['frequency']
        axes = ('_x', '_y') if isinstance(where, tuple) else ('',)
        for axis, value in zip(axes, np.atleast_1d(where), strict=True):
            key = f'fourier_{name}_worst_frequency{axis}'
            found[key] = float(value)
    for row in rows[1:]:
        if row['kind'] != 'fourier':
            found |= {f'{row["kind"]}_{name}': row[name] for name in names}
    return found
