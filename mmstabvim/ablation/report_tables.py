"""Tables of a report: their columns, and the text and numbers in them."""

import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mmstabvim.ablation import results, statistics
from mmstabvim.ablation.layout import facet_values
from mmstabvim.ablation.results import Study
from mmstabvim.ablation.statistics import (
    Combination,
    Difference,
    MeanStd,
    known,
)
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
_DIFFERENCES = (
    'Paired over the seeds that finished in both: mean difference in '
    '{metric}, its 95 % confidence interval (Student), number of pairs, p, '
    'and p corrected for {tests} comparison(s) (Holm). Diverged trainings '
    'have no score: read it beside the divergence. An interval that holds 0 '
    'is no evidence of an effect, nor of its absence.'
)


def make_tables(
    study: Study, combinations: Sequence[Combination]
) -> list[Table]:
    """Make the tables that have something to say.

    Args:
        study (Study): Finished or not.
        combinations (Sequence[Combination]): Result of
            ``statistics.combine``.

    Returns:
        list[Table]: In the order of the report.
    """
    found = [
        results_table(study, combinations),
        scores_table(study, combinations),
        differences_table(study, combinations),
        unfinished_table(study),
    ]
    # the main result of a ladder of learning rates
    place = 0 if _has_ladder(combinations) else 3
    found.insert(place, divergence_table(study, combinations))
    return [table for table in found if table.rows]


def _table(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[Mapping[str, str]],
    data: Sequence[dict[str, Any]],
    words: Collection[str],
) -> Table:
    """Put rows, each from head to text, into a table."""
    columns = list(rows[0]) if rows else []
    align = ''.join('l' if head in words else 'r' for head in columns)
    cells = [list(row.values()) for row in rows]
    return Table(name, title, caption, columns, cells, data, align)


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


def _named(combination: Combination, heads: Sequence[str]) -> dict[str, str]:
    values = facet_values(combination)
    return {head: values.get(head, '') for head in heads}


def _facts(c: Combination, heads: Sequence[str]) -> dict[str, Any]:
    """Columns of every CSV file that name the combination."""
    used = c.cells[0].lr_used
    return {**_named(c, heads), 'precision': c.precision, 'lr': used}


def results_table(study: Study, combinations: Sequence[Combination]) -> Table:
    """Score, divergence and cost of each combination.

    Args:
        study (Study): Finished or not.
        combinations (Sequence[Combination]): Result of
            ``statistics.combine``.

    Returns:
        Table: A row per combination.
    """
    heads = _heads(combinations)
    rows, data = [], []
    for c in combinations:
        facts = _result(study, c)
        rows.append({**_named(c, heads), **_shown_result(study, c, facts)})
        data.append({**_facts(c, heads), **facts})
    caption = _results_caption(study, combinations)
    return _table('results', 'Results', caption, rows, data, heads)


def _result(study: Study, c: Combination) -> dict[str, Any]:
    """Numbers of a row of the results."""
    step_ms = 1e3 * statistics.sample(c.recorded('seconds_per_step')).mean
    best = _best(c, study.metric)
    return {
        'metric': study.metric,
        'mean': known(c.metric.mean),
        'std': known(c.metric.std),
        'n': c.metric.n,
        'planned': len(c.cells),
        'diverged': c.rate.count,
        'ended': c.rate.n,
        'collapsed': c.collapsed,
        'rate_low': known(c.rate.low),
        'rate_high': known(c.rate.high),
        'first_diverged_steps': ' '.join(map(str, c.first_diverged_steps)),
        'step_ms': known(step_ms),
        'memory_mb': max(c.recorded('memory_mb'), default=None),
        'best_mean': known(best.mean),
        'best_std': known(best.std),
    }


def _shown_result(
    study: Study, c: Combination, facts: dict[str, Any]
) -> dict[str, str]:
    """Text of a row of the results, by head."""
    shown = {
        study.metric: plus_minus(c.metric),
        'seeds': f'{c.metric.n} of {len(c.cells)}',
        'diverged': f'{c.rate.count}/{c.rate.n}' if c.rate.n else DASH,
    }
    if study.collapse_below is not None:
        shown['collapsed'] = f'{c.collapsed}/{c.metric.n}'
    step_ms, memory = facts['step_ms'], facts['memory_mb']
    return {
        **shown,
        'first at': ', '.join(map(str, c.first_diverged_steps)) or DASH,
        'ms/step': DASH if step_ms is None else number(step_ms, 3),
        'MB': DASH if memory is None else f'{memory:.0f}',
    }


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
    """Metrics that the matrix asks for besides the score.

    Args:
        study (Study): The table is empty without ``more_metrics``.
        combinations (Sequence[Combination]): Result of
            ``statistics.combine``.

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
        texts = {name: plus_minus(values) for name, values in found.items()}
        rows.append({**_named(c, heads), **texts})
        data += [
            {
                **_facts(c, heads),
                'metric': name,
                'mean': known(values.mean),
                'std': known(values.std),
                'n': values.n,
            }
            for name, values in found.items()
        ]
    return _table(
        'scores',
        'Other scores',
        'Mean ± standard deviation over the seeds that finished, of the last '
        'validation.',
        rows,
        data,
        heads,
    )


def _sample_of(c: Combination, metric: str) -> MeanStd:
    finals = [cell.final(metric) for cell in c.cells]
    return statistics.sample([value for value in finals if value is not None])


def _best(c: Combination, metric: str) -> MeanStd:
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


def plus_minus(found: MeanStd, decimals: int = 2) -> str:
    """Write mean and standard deviation.

    Args:
        found (MeanStd): Over any number of values.
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
        digits (int): Count of significant ones.

    Returns:
        str: Without exponent.
    """
    if math.isnan(value):
        return DASH
    if value == 0:
        return '0'
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return signed(value, max(decimals, 0))


def differences_table(
    study: Study, combinations: Sequence[Combination]
) -> Table:
    """Difference of each combination to its baseline.

    Args:
        study (Study): The table is empty without a baseline.
        combinations (Sequence[Combination]): Result of
            ``statistics.combine``.

    Returns:
        Table: A row per combination that has a baseline.
    """
    heads = _heads(combinations)
    compared = [
        (c, c.difference) for c in combinations if c.difference is not None
    ]
    rows = [{**_named(c, heads), **_shown_difference(d)} for c, d in compared]
    data = [
        {
            **_facts(c, heads),
            'metric': study.metric,
            'difference': known(d.mean),
            'std': known(d.std),
            'low': known(d.low),
            'high': known(d.high),
            'pairs': d.n,
            'p': known(d.p),
            'p_holm': known(d.p_holm),
            'verdict': d.verdict,
        }
        for c, d in compared
    ]
    base = ', '.join(f'{k} = {v}' for k, v in study.baseline.items())
    tests = sum(not math.isnan(d.p) for _, d in compared)
    caption = _DIFFERENCES.format(metric=study.metric, tests=tests)
    title = f'Difference to {base}'
    words = [*heads, 'reads']
    return _table('differences', title, caption, rows, data, words)


def _shown_difference(d: Difference) -> dict[str, str]:
    """Text of a row of the differences, by head."""
    return {
        'difference': signed(d.mean, 2) if d.n else DASH,
        '95 % interval': interval(d),
        'pairs': str(d.n),
        'p': _p(d.p),
        'Holm': _p(d.p_holm),
        'reads': d.verdict,
    }


def interval(d: Difference) -> str:
    """Write a confidence interval.

    Args:
        d (Difference): May lack an interval.

    Returns:
        str: A dash without one.
    """
    if math.isnan(d.low):
        return DASH
    return f'{signed(d.low, 2)} to {signed(d.high, 2)}'


def _p(value: float) -> str:
    if math.isnan(value):
        return DASH
    return '<0.001' if value < 1e-3 else f'{value:.3f}'


def divergence_table(
    study: Study, combinations: Sequence[Combination]
) -> Table:
    """Divergence over all learning rates, and the largest stable one.

    Args:
        study (Study): Finished or not.
        combinations (Sequence[Combination]): Result of
            ``statistics.combine``.

    Returns:
        Table: A row per labels and precision; none if nothing diverged and
        there is one learning rate.
    """
    heads = [head for head in _heads(combinations) if head != 'lr']
    ladder = _has_ladder(combinations)
    groups: dict[tuple, list[Combination]] = {}
    for c in combinations:
        key = tuple(_named(c, heads).items())
        groups.setdefault(key, []).append(c)
    rows, data = [], []
    for key, group in groups.items():
        shown, facts = _divergence(study, group, ladder)
        rows.append({**dict(key), **shown})
        data.append({**dict(key), **facts})
    caption = _DIVERGENCE
    if ladder:
        caption += _ladder_caption(study)
    elif not any(row['diverged'] for row in data):
        rows, data = [], []
    return _table('divergence', 'Divergence', caption, rows, data, heads)


def _divergence(
    study: Study, group: Sequence[Combination], ladder: bool
) -> tuple[dict[str, str], dict[str, Any]]:
    """Text by head, and numbers, of combinations that differ in the lr."""
    cells = [cell for c in group for cell in c.cells]
    rate = statistics.divergence_rate(cells)
    stable = statistics.climb(cells)
    learns = statistics.climb(cells, study.has_collapsed)
    steps = sorted(s for c in group for s in c.first_diverged_steps)
    middle = steps[(len(steps) - 1) // 2] if steps else None
    shown = {
        'diverged': f'{rate.count}/{rate.n}' if rate.n else DASH,
        '95 % interval': _percent(rate),
        'first at': DASH if middle is None else f'{middle}',
    }
    if ladder:
        shown['stable lr'] = ladder_text(stable)
        if study.collapse_below is not None:
            shown['learns up to'] = ladder_text(learns)
    facts = {
        'diverged': rate.count,
        'ended': rate.n,
        'rate_low': known(rate.low),
        'rate_high': known(rate.high),
        'median_first_diverged_step': middle,
        'largest_stable_lr': stable.largest,
        'largest_tried': stable.top,
        'complete': stable.complete,
        'largest_learning_lr': learns.largest,
    }
    return shown, facts


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
        ladder (statistics.Ladder): Result of the climb of one combination.

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
    rows = [{name: text or DASH for name, text in d.items()} for d in data]
    return _table(
        'unfinished',
        'Cells without a result',
        'For those that failed the exit code and the last line of the log.',
        rows,
        data,
        ('cell', 'status', 'reason'),
    )
