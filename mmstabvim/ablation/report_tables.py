"""Tables of a report: which columns they have and how they are filled."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from mmstabvim.ablation import results, statistics
from mmstabvim.ablation.layout import facet_values
from mmstabvim.ablation.results import Study
from mmstabvim.ablation.statistics import Combination, Difference, Sample
from mmstabvim.reporting.tables import Table

DASH = '—'
_DIVERGENCE = (
    'Trainings that diverged, of those that ended, over all learning rates; '
    "Wilson's 95 % interval of the rate; lower median of the iterations at "
    'which they did.'
)
_LADDER = (
    ' Stable lr: the largest learning rate tried at which, and below which, '
    'none diverged{learns}. ≥: nothing larger was tried; <: already the '
    'smallest did; *: some seeds are missing.{warning}'
)


def make_tables(
    study: Study, combinations: Sequence[Combination]
) -> list[Table]:
    """All tables that have something to say.

    Args:
        study (Study): Finished or not.
        combinations (Sequence[Combination]): Of ``statistics.combine``.

    Returns:
        list[Table]: In the order of the report.
    """
    found = [
        results_table(study, combinations),
        scores_table(study, combinations),
        differences_table(study, combinations),
        unfinished_table(study),
    ]
    # of a ladder of learning rates it is what there is to say
    place = 0 if _has_ladder(combinations) else 3
    found.insert(place, divergence_table(study, combinations))
    return [table for table in found if table.rows]


def _has_ladder(combinations: Sequence[Combination]) -> bool:
    return len({c.cells[0].lr_used for c in combinations}) > 1


def _heads(combinations: Sequence[Combination]) -> list[str]:
    """Labels, and precision and learning rate if they vary."""
    values: dict[str, set[str]] = {}
    for c in combinations:
        for name, value in facet_values(c).items():
            values.setdefault(name, set()).add(value)
    labels = [n for n in values if n not in ('precision', 'lr')]
    more = [n for n in ('precision', 'lr') if len(values.get(n, ())) > 1]
    return [*labels, *more]


def _names(combination: Combination, heads: Sequence[str]) -> list[str]:
    values = facet_values(combination)
    return [values.get(head, '') for head in heads]


def _facts(c: Combination, heads: Sequence[str]) -> dict[str, Any]:
    """The columns of every CSV file that name the combination."""
    named = dict(zip(heads, _names(c, heads), strict=True))
    used = c.cells[0].lr_used
    return {**named, 'precision': c.precision, 'lr': used}


def results_table(study: Study, combinations: Sequence[Combination]) -> Table:
    """Score, divergence and cost of each combination.

    Args:
        study (Study): Finished or not.
        combinations (Sequence[Combination]): Of ``statistics.combine``.

    Returns:
        Table: A row per combination.
    """
    heads = _heads(combinations)
    collapse = study.collapse_below is not None
    rows, data = [], []
    for c in combinations:
        steps = c.first_diverged_steps
        times = c.recorded('seconds_per_step')
        memory = c.recorded('memory_mb')
        step_ms = 1e3 * statistics.sample(times).mean
        rows.append(
            [
                *_names(c, heads),
                plus_minus(c.metric),
                f'{c.metric.n} of {len(c.cells)}',
                f'{c.rate.count}/{c.rate.n}' if c.rate.n else DASH,
                *([f'{c.collapsed}/{c.metric.n}'] if collapse else []),
                ', '.join(map(str, steps)) or DASH,
                number(step_ms, 3),
                f'{max(memory):.0f}' if memory else DASH,
            ]
        )
        data.append(
            {
                **_facts(c, heads),
                'metric': study.metric,
                'mean': _known(c.metric.mean),
                'std': _known(c.metric.std),
                'n': c.metric.n,
                'planned': len(c.cells),
                'diverged': c.rate.count,
                'ended': c.rate.n,
                'collapsed': c.collapsed,
                'rate_low': _known(c.rate.low),
                'rate_high': _known(c.rate.high),
                'first_diverged_steps': ' '.join(map(str, steps)),
                'step_ms': _known(step_ms),
                'memory_mb': max(memory, default=None),
                'best_mean': _known(_best(c, study.metric).mean),
                'best_std': _known(_best(c, study.metric).std),
            }
        )
    columns = [
        *heads,
        study.metric,
        'seeds',
        'diverged',
        *(['collapsed'] if collapse else []),
        'first at',
        'ms/step',
        'MB',
    ]
    return Table(
        'results',
        'Results',
        _results_caption(study, combinations),
        columns,
        rows,
        data,
        'l' * len(heads) + 'r' * (len(columns) - len(heads)),
    )


def _results_caption(study: Study, combinations: Sequence[Combination]) -> str:
    collapsed = ''
    if study.collapse_below is not None:
        collapsed = (
            '; collapsed: those of the finished ones whose score is below '
            f'{study.collapse_below:g}'
        )
    return (
        'Mean ± standard deviation over the seeds that finished, and how many '
        'of the planned ones did; trainings that diverged, of those that '
        f'ended, and the iteration at which each did{collapsed}; mean over '
        'the seeds of the median time per step; largest memory of a training '
        f'({_memory_kinds(combinations)}).'
    )


def scores_table(study: Study, combinations: Sequence[Combination]) -> Table:
    """The other metrics that the matrix asks for.

    Args:
        study (Study): With ``more_metrics``, else the table is empty.
        combinations (Sequence[Combination]): Of ``statistics.combine``.

    Returns:
        Table: A row per combination, a column per metric.
    """
    heads = _heads(combinations)
    logged = [
        name for cell in study.cells for name in cell.record.get('final') or {}
    ]
    metrics = [
        name
        for name in dict.fromkeys(logged)
        if any(fnmatchcase(name, p) for p in study.more_metrics)
    ]
    rows, data = [], []
    for c in combinations if metrics else ():
        found = {name: _sample_of(c, name) for name in metrics}
        rows.append([*_names(c, heads), *map(plus_minus, found.values())])
        data += [
            {
                **_facts(c, heads),
                'metric': name,
                'mean': _known(values.mean),
                'std': _known(values.std),
                'n': values.n,
            }
            for name, values in found.items()
        ]
    return Table(
        'scores',
        'Other scores',
        'Mean ± standard deviation over the seeds that finished, of the last '
        'validation.',
        [*heads, *metrics],
        rows,
        data,
        'l' * len(heads) + 'r' * len(metrics),
    )


def _sample_of(c: Combination, metric: str) -> Sample:
    finals = [cell.final(metric) for cell in c.cells]
    return statistics.sample([value for value in finals if value is not None])


def _best(c: Combination, metric: str) -> Sample:
    found = [
        (cell.record.get('best') or {}).get(metric)
        for cell in c.cells
        if cell.status == results.DONE
    ]
    return statistics.sample([value for value in found if value is not None])


def _memory_kinds(combinations: Sequence[Combination]) -> str:
    kinds = {
        cell.record.get('memory_kind')
        for c in combinations
        for cell in c.cells
    }
    names = {'GPU': 'on the GPU', 'resident': 'resident, of its process'}
    said = [text for kind, text in names.items() if kind in kinds]
    return ' or '.join(said) or 'none recorded'


def plus_minus(found: Sample, decimals: int = 2) -> str:
    """Write mean and standard deviation.

    Args:
        found (Sample): Of any number of values.
        decimals (int): Digits after the point; two more for values below 1.
            Defaults to 2.

    Returns:
        str: A dash without values, the mean alone with one.
    """
    if not found.n:
        return DASH
    decimals += 2 if abs(found.mean) < 1 else 0
    text = signed(found.mean, decimals)
    if math.isnan(found.std):
        return text
    return f'{text} ± {found.std:.{decimals}f}'


def signed(value: float, decimals: int) -> str:
    """Write a number with a real minus sign.

    Args:
        value (float): The number.
        decimals (int): Digits after the point.

    Returns:
        str: Its text.
    """
    return f'{value:.{decimals}f}'.replace('-', '\N{MINUS SIGN}')


def number(value: float, digits: int) -> str:
    """Write a number with some significant digits, a dash for NaN.

    Args:
        value (float): The number.
        digits (int): How many.

    Returns:
        str: Without exponent.
    """
    if math.isnan(value):
        return DASH
    if value == 0:
        return '0'
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return signed(value, max(decimals, 0))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def differences_table(
    study: Study, combinations: Sequence[Combination]
) -> Table:
    """What each combination changes against its baseline.

    Args:
        study (Study): With a baseline, else the table is empty.
        combinations (Sequence[Combination]): Of ``statistics.combine``.

    Returns:
        Table: A row per combination that has a baseline.
    """
    heads = _heads(combinations)
    compared = [
        (c, c.difference) for c in combinations if c.difference is not None
    ]
    rows, data = [], []
    for c, d in compared:
        rows.append(
            [
                *_names(c, heads),
                signed(d.mean, 2) if d.n else DASH,
                interval(d),
                str(d.n),
                DASH if math.isnan(d.p) else _p(d.p),
                DASH if math.isnan(d.p_holm) else _p(d.p_holm),
                d.verdict,
            ]
        )
        data.append(
            {
                **_facts(c, heads),
                'metric': study.metric,
                'difference': _known(d.mean),
                'std': _known(d.std),
                'low': _known(d.low),
                'high': _known(d.high),
                'pairs': d.n,
                'p': _known(d.p),
                'p_holm': _known(d.p_holm),
                'verdict': d.verdict,
            }
        )
    base = ', '.join(f'{k} = {v}' for k, v in study.baseline.items())
    tests = sum(not math.isnan(d.p) for _, d in compared)
    return Table(
        'differences',
        f'Difference to {base}',
        f'Paired over the seeds that finished in both: mean difference in '
        f'{study.metric}, its 95 % confidence interval (Student), number of '
        'pairs, p, and p corrected for '
        f'{tests} comparison(s) (Holm). Diverged trainings have no score: '
        'read it beside the divergence. An interval that holds 0 is no '
        'evidence of an effect, nor of its absence.',
        [*heads, 'difference', '95 % interval', 'pairs', 'p', 'Holm', 'reads'],
        rows,
        data,
        'l' * len(heads) + 'rrrrrl',
    )


def interval(d: Difference) -> str:
    """Write a confidence interval.

    Args:
        d (Difference): With or without one.

    Returns:
        str: A dash without one.
    """
    if math.isnan(d.low):
        return DASH
    return f'{signed(d.low, 2)} to {signed(d.high, 2)}'


def _p(value: float) -> str:
    return '<0.001' if value < 1e-3 else f'{value:.3f}'


def divergence_table(
    study: Study, combinations: Sequence[Combination]
) -> Table:
    """Divergence over all learning rates, and the largest stable one.

    Args:
        study (Study): Finished or not.
        combinations (Sequence[Combination]): Of ``statistics.combine``.

    Returns:
        Table: A row per labels and precision; none if nothing diverged and
        there is one learning rate.
    """
    heads = [head for head in _heads(combinations) if head != 'lr']
    groups: dict[tuple, list[Combination]] = {}
    for c in combinations:
        groups.setdefault(tuple(_names(c, heads)), []).append(c)
    rows, data = [], []
    for names, group in groups.items():
        cells = [cell for c in group for cell in c.cells]
        rate = statistics.divergence_rate(cells)
        ladder = statistics.climb(cells)
        learns = statistics.climb(cells, study.has_collapsed)
        steps = sorted(s for c in group for s in c.first_diverged_steps)
        middle = steps[(len(steps) - 1) // 2] if steps else None
        rows.append(
            [
                *names,
                f'{rate.count}/{rate.n}' if rate.n else DASH,
                _percent(rate),
                DASH if middle is None else f'{middle}',
                ladder_text(ladder),
                ladder_text(learns),
            ]
        )
        data.append(
            {
                **dict(zip(heads, names, strict=True)),
                'diverged': rate.count,
                'ended': rate.n,
                'rate_low': _known(rate.low),
                'rate_high': _known(rate.high),
                'median_first_diverged_step': middle,
                'largest_stable_lr': ladder.largest,
                'largest_tried': ladder.top,
                'complete': ladder.complete,
                'largest_learning_lr': learns.largest,
            }
        )
    columns = ['diverged', '95 % interval', 'first at']
    caption = _DIVERGENCE
    if _has_ladder(combinations):
        caption += _ladder_caption(study)
        columns.append('stable lr')
        if study.collapse_below is not None:
            columns.append('learns up to')
    elif not any(row['diverged'] for row in data):
        rows, data = [], []
    rows = [row[: len(heads) + len(columns)] for row in rows]
    return Table(
        'divergence',
        'Divergence',
        caption,
        [*heads, *columns],
        rows,
        data,
        'l' * len(heads) + 'r' * len(columns),
    )


def _ladder_caption(study: Study) -> str:
    if study.collapse_below is None:
        warning = (
            ' A training with a finite loss may have learnt nothing: read it '
            'beside the scores.'
        )
        return _LADDER.format(learns='', warning=warning)
    learns = '; learns up to: none diverged or collapsed'
    return _LADDER.format(learns=learns, warning='')


def _percent(rate: statistics.Rate) -> str:
    if not rate.n:
        return DASH
    return f'{100 * rate.low:.0f} to {100 * rate.high:.0f} %'


def ladder_text(ladder: statistics.Ladder) -> str:
    """Write the largest stable learning rate.

    Args:
        ladder (statistics.Ladder): Of one combination.

    Returns:
        str: With a sign if the ladder is too short to tell.
    """
    if ladder.smallest is None:
        return DASH
    if ladder.largest is None:
        return f'<{ladder.smallest:g}' if ladder.complete else DASH
    sign = '≥' if ladder.top else ''
    return f'{sign}{ladder.largest:g}{"" if ladder.complete else "*"}'


def unfinished_table(study: Study) -> Table:
    """Cells without a result, and why.

    Args:
        study (Study): Finished or not.

    Returns:
        Table: A row per cell that is neither done nor diverged.
    """
    cells = [c for c in study.cells if c.status not in results.FINISHED]
    data = [
        {'cell': c.name, 'status': c.status, 'reason': c.reason} for c in cells
    ]
    return Table(
        'unfinished',
        'Cells without a result',
        'For those that failed the exit code and the last line of the log.',
        ['cell', 'status', 'reason'],
        [[d['cell'], d['status'], d['reason'] or DASH] for d in data],
        data,
        'lll',
    )
