"""Condense seeds: means, rates, differences with their uncertainty."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

from mmstabvim.ablation import results
from mmstabvim.ablation.results import Result, Study

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class MeanStd:
    """Mean and spread of a value over several seeds.

    Attributes:
        n (int): Count of the seeds.
        mean (float): NaN without values.
        std (float): Estimate for the population, with n - 1; NaN below two.
    """

    n: int
    mean: float
    std: float


def sample(values: Sequence[float]) -> MeanStd:
    """Mean and standard deviation.

    Args:
        values (Sequence[float]): One per seed.

    Returns:
        MeanStd: Standard deviation with ``ddof=1``.
    """
    found = np.asarray(values, np.float64)
    mean = float(found.mean()) if found.size else math.nan
    std = float(found.std(ddof=1)) if found.size > 1 else math.nan
    return MeanStd(found.size, mean, std)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Paired difference to the baseline over the seeds that both have.

    Attributes:
        n (int): Pairs.
        mean (float): NaN without pairs.
        std (float): Spread of the differences, NaN below two pairs.
        low (float): Lower end of the 95 % interval for the mean.
        high (float): Upper end.
        p (float): Two-sided, of Student's t test on the differences.
        p_holm (float): The same, corrected for the number of comparisons.
        identical (bool): True if every pair is equal.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float
    p: float
    p_holm: float = math.nan
    identical: bool = False

    @property
    def verdict(self) -> str:
        """Conclusion that the difference allows, in words."""
        if self.n == 0:
            return 'no pairs'
        if self.identical:
            return 'identical'
        if math.isnan(self.low):
            return 'too few pairs'
        if self.low <= 0 <= self.high:
            return 'no clear difference'
        side = 'higher' if self.mean > 0 else 'lower'
        if self.p_holm <= 1 - LEVEL:
            return side
        return f'{side}, not after correction'


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> Difference:
    """Compare seed by seed.

    The interval is Student's. Differences that are all equal but not zero
    get none: with so few seeds that says nothing about their spread.

    Args:
        values (Mapping[int, float]): By seed.
        baseline (Mapping[int, float]): By seed.

    Returns:
        Difference: ``values`` minus ``baseline``.
    """
    seeds = sorted(set(values) & set(baseline))
    pairs = np.array([values[s] - baseline[s] for s in seeds], np.float64)
    found = sample(pairs.tolist())
    identical = found.n > 0 and not pairs.any()
    low = high = p = math.nan
    if found.n > 1 and found.std > 0:
        test = stats.ttest_1samp(pairs, 0.0)
        low, high = map(float, test.confidence_interval(LEVEL))
        p = float(test.pvalue)
    return Difference(
        found.n, found.mean, found.std, low, high, p, identical=identical
    )


def correct(differences: Sequence[Difference]) -> list[Difference]:
    """Correct p values for making several comparisons (Holm, 1979).

    Args:
        differences (Sequence[Difference]): One family of comparisons.

    Returns:
        list[Difference]: The same with ``p_holm``.
    """
    order = sorted(
        (i for i, d in enumerate(differences) if not math.isnan(d.p)),
        key=lambda i: differences[i].p,
    )
    corrected, largest = list(differences), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, (len(order) - rank) * differences[i].p)
        corrected[i] = dataclasses.replace(
            differences[i], p_holm=min(largest, 1.0)
        )
    return corrected


@dataclasses.dataclass(frozen=True)
class Rate:
    """Share of several trainings that diverged.

    Attributes:
        count (int): Diverged.
        n (int): Done or diverged.
        low (float): Lower end of Wilson's 95 % interval, NaN without any.
        high (float): Upper end.
    """

    count: int
    n: int
    low: float
    high: float


def known(value: float) -> float | None:
    """Replace NaN by None, for JSON and CSV.

    Args:
        value (float): The number.

    Returns:
        float | None: None for NaN.
    """
    return None if math.isnan(value) else value


def divergence_rate(cells: Sequence[Result]) -> Rate:
    """Rate among the cells that ended by themselves.

    Args:
        cells (Sequence[Result]): Trainings of one combination.

    Returns:
        Rate: Failed and missing cells do not count.
    """
    ended = [c.status for c in cells if c.status in results.FINISHED]
    count = ended.count(results.DIVERGED)
    low = high = math.nan
    if ended:
        test = stats.binomtest(count, len(ended))
        low, high = test.proportion_ci(LEVEL, method='wilson')
    return Rate(count, len(ended), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Largest learning rate at which nothing diverged or collapsed.

    Attributes:
        largest (float | None): None if the smallest one did, or if no
            training ended.
        top (bool): True if it is the largest one tried.
        smallest (float | None): The smallest one tried, None without any.
        complete (bool): True if all seeds up to there ended.
    """

    largest: float | None
    top: bool
    smallest: float | None
    complete: bool


def climb(
    cells: Sequence[Result],
    has_collapsed: Callable[[Result], bool] = lambda cell: False,
) -> Ladder:
    """Go up the learning rates until a training diverges or collapses.

    Args:
        cells (Sequence[Result]): One combination at any learning rates.
        has_collapsed (Callable): Tells that a training has learnt nothing.
            Defaults to none.

    Returns:
        Ladder: A learning rate without any ended training ends the climb.
    """
    rungs: dict[float, list[Result]] = {}
    for cell in cells:
        if cell.lr_used is not None:
            rungs.setdefault(cell.lr_used, []).append(cell)
    largest, top, complete = None, False, True
    for lr in sorted(rungs):
        rate = divergence_rate(rungs[lr])
        if rate.count == 0 and rate.n < len(rungs[lr]):
            complete = False
        if rate.count or not rate.n or any(map(has_collapsed, rungs[lr])):
            top = False
            break
        largest, top = lr, True
    return Ladder(largest, top, min(rungs, default=None), complete)


@dataclasses.dataclass(frozen=True)
class Combination:
    """Cells that differ in their seed only, and what they say together.

    Attributes:
        labels (dict[str, str]): Distinction of the config from others.
        precision (str): ``'fp32'``, ``'bf16'`` or ``'fp16'``.
        lr (float | None): None for the config's own.
        cells (list[Result]): By seed.
        metric (MeanStd): Final metric of those that are done.
        rate (Rate): Divergence.
        collapsed (int): Count of those that are done with a score below
            ``collapse_below`` of the matrix: they have learnt nothing.
        difference (Difference | None): None for the baseline itself and
            where there is no baseline.
    """

    labels: dict[str, str]
    precision: str
    lr: float | None
    cells: list[Result]
    metric: MeanStd
    rate: Rate
    collapsed: int
    difference: Difference | None

    @property
    def first_diverged_steps(self) -> list[int]:
        """Iteration of each divergence, sorted."""
        steps = [
            cell.record.get('first_diverged_step')
            for cell in self.cells
            if cell.status == results.DIVERGED
        ]
        return sorted(step for step in steps if step is not None)

    def recorded(self, name: str) -> list[float]:
        """A number of ``cell.json`` of each cell that ended by itself."""
        values = [
            cell.record.get(name)
            for cell in self.cells
            if cell.status in results.FINISHED
        ]
        return [value for value in values if value is not None]


def combine(study: Study) -> list[Combination]:
    """Condense a study.

    Args:
        study (Study): Finished or not.

    Returns:
        list[Combination]: In the order of the labels, precisions and
        learning rates.
    """
    groups = results.combinations(study.cells)
    keys = sorted(groups, key=lambda key: _order(key, study))
    found: dict[tuple, Combination] = {}
    for key in keys:
        labels, precision, lr = dict(key[0]), key[1], key[2]
        values = _finals(groups[key], study.metric)
        base = groups.get(_baseline_key(key, study.baseline), [])
        difference = None
        if base and base is not groups[key]:
            reference = _finals(base, study.metric)
            difference = paired_difference(values, reference)
        found[key] = Combination(
            labels,
            precision,
            lr,
            groups[key],
            sample(list(values.values())),
            divergence_rate(groups[key]),
            sum(study.has_collapsed(cell) for cell in groups[key]),
            difference,
        )
    return _corrected(list(found.values()))


def _finals(cells: Sequence[Result], metric: str) -> dict[int, float]:
    """Final metric by seed."""
    values = {cell.seed: cell.final(metric) for cell in cells}
    return {s: v for s, v in values.items() if v is not None}


def _baseline_key(key: tuple, baseline: Mapping[str, str]) -> tuple:
    """Key of what a combination is compared with."""
    labels = dict(key[0])
    if not baseline or not set(baseline) <= set(labels):
        return ()
    labels.update(baseline)
    return (tuple(labels.items()), key[1], key[2])


def _corrected(combinations: list[Combination]) -> list[Combination]:
    """Correct the p values over all comparisons of the study."""
    found = [c.difference for c in combinations if c.difference is not None]
    left = iter(correct(found))
    return [
        dataclasses.replace(c, difference=c.difference and next(left))
        for c in combinations
    ]


def _order(key: tuple, study: Study) -> tuple:
    """Sort key: labels, then precision, then learning rate."""
    ranks = []
    for label, values in study.orders.items():
        value = dict(key[0]).get(label)
        ranks.append(values.index(value) if value in values else -1)
    precisions = list(results.PRECISIONS)
    return (ranks, precisions.index(key[1]), key[2] or 0.0)
