"""Numbers against ones computed by hand or read from tables."""

import math
from pathlib import Path

import pytest

from mmstabvim.ablation import results
from mmstabvim.ablation.statistics import (
    climb,
    combine,
    correct,
    divergence_rate,
    paired_difference,
    sample,
)


def test_mean_and_standard_deviation():
    found = sample([2.0, 4.0, 9.0])
    assert (found.n, found.mean) == (3, 5.0)
    assert found.std == pytest.approx(math.sqrt(26 / 2))
    assert math.isnan(sample([1.0]).std)
    assert math.isnan(sample([]).mean)


def test_paired_difference():
    """Differences 1, 2, 3: mean 2, std 1; t(0.975, 2) = 4.302653."""
    values, base = {0: 11.0, 1: 22.0, 2: 33.0, 5: 0.0}, {0: 10, 1: 20, 2: 30}
    found = paired_difference(values, base)
    assert (found.n, found.mean, found.std) == (3, 2.0, 1.0)
    half = 4.302653 / math.sqrt(3)
    assert found.low == pytest.approx(2 - half, abs=1e-5)
    assert found.high == pytest.approx(2 + half, abs=1e-5)
    # t = 2 sqrt(3) on two degrees: p = 1 - t / sqrt(2 + t^2)
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.verdict == 'no clear difference'


def test_what_a_few_pairs_cannot_say():
    assert paired_difference({0: 1.0}, {1: 1.0}).verdict == 'no pairs'
    assert paired_difference({0: 2.0}, {0: 1.0}).verdict == 'too few pairs'
    same = {0: 1.0, 1: 5.0}
    assert paired_difference(same, same).verdict == 'identical'
    # equal differences of few discrete scores are no certainty
    shifted = paired_difference({0: 2.0, 1: 6.0}, same)
    assert (shifted.mean, shifted.verdict) == (1.0, 'too few pairs')


def test_clear_differences_before_and_after_correction():
    base = dict.fromkeys(range(4), 0.0)
    down = paired_difference({0: -1.0, 1: -1.1, 2: -0.9, 3: -1.0}, base)
    weak = paired_difference({0: 1.0, 1: 0.2, 2: 0.9, 3: 0.7}, base)
    assert weak.p < 0.05
    found = correct([weak, down, weak])
    assert found[1].verdict == 'lower'
    assert found[0].verdict == 'higher, not after correction'


def test_holm():
    """Smallest p times 3, next times 2, never falling."""
    base = paired_difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})

    def with_p(*values):
        import dataclasses

        return [dataclasses.replace(base, p=p) for p in values]

    found = correct(with_p(0.03, 0.01, math.nan, 0.02))
    holm = [d.p_holm for d in found]
    assert holm[:2] == pytest.approx([0.04, 0.03])
    assert math.isnan(holm[2])
    assert holm[3] == pytest.approx(0.04)
    assert correct(with_p(0.7, 0.6))[0].p_holm == 1.0


def cell(status='done', lr=1.0, seed=0, labels=None, score=None):
    record = dict(final={'acc': score}) if score is not None else {}
    return results.Result(
        'x', labels or {}, seed, 'fp32', lr, lr, Path(), record, status
    )


def test_divergence_rate():
    """1 of 3: Wilson's interval is (0.0615, 0.7923)."""
    cells = [cell('done'), cell('diverged'), cell('done')]
    found = divergence_rate([*cells, cell('failed'), cell('missing')])
    assert (found.count, found.n) == (1, 3)
    assert found.low == pytest.approx(0.0615, abs=1e-4)
    assert found.high == pytest.approx(0.7923, abs=1e-4)
    assert math.isnan(divergence_rate([cell('killed')]).low)


@pytest.mark.parametrize(
    ('rungs', 'largest', 'top', 'complete'),
    [
        ({1: ['done'], 2: ['done'], 4: ['diverged']}, 2, False, True),
        # luck above a divergence does not count
        ({1: ['done'], 2: ['diverged', 'done'], 4: ['done']}, 1, False, True),
        ({1: ['done'], 2: ['done']}, 2, True, True),
        ({1: ['diverged']}, None, False, True),
        ({1: ['missing'], 2: ['done']}, None, False, False),
        (
            {1: ['done'], 2: ['done', 'killed'], 4: ['diverged']},
            2,
            False,
            False,
        ),
        ({}, None, False, True),
    ],
)
def test_ladder(rungs, largest, top, complete):
    cells = [cell(s, float(lr)) for lr, found in rungs.items() for s in found]
    found = climb(cells)
    assert (found.largest, found.top) == (largest, top)
    assert found.complete == complete
    assert found.smallest == (1 if rungs else None)


def make_study(cells, baseline=None, **orders):
    return results.Study('t', 'acc', baseline or {}, orders, cells)


def test_order_of_combinations():
    """Labels as the matrix lists them, learning rates rising."""
    cells = [
        cell(labels=dict(matrix=m, stabilizer=s), lr=lr)
        for lr in (2.0, 1.0)
        for s in ('all', 'sp', 'none')
        for m in ('b', 'a')
    ]
    orders = dict(matrix=['b', 'a'], stabilizer=['none', 'sp', 'all'])
    found = combine(make_study(cells, **orders))
    assert [(c.labels['matrix'], c.labels['stabilizer']) for c in found] == [
        (m, s) for m in 'ba' for s in ('none', 'sp', 'all') for _ in (1, 2)
    ]
    assert [c.lr for c in found[:2]] == [1.0, 2.0]


def test_baselines_share_everything_else():
    def make(matrix, stabilizer, lr, shift):
        labels = dict(matrix=matrix, stabilizer=stabilizer)
        return [
            cell(lr=lr, seed=s, labels=labels, score=10.0 * s + shift)
            for s in (0, 1)
        ]

    cells = [
        *make('a', 'none', 1.0, 1.0),
        *make('a', 'none', 2.0, 2.0),
        *make('a', 'sn', 1.0, 1.5),
        *make('a', 'sn', 2.0, 2.25),
        *make('b', 'sn', 1.0, 0.0),
    ]
    orders = dict(matrix=['a', 'b'], stabilizer=['none', 'sn'])
    found = combine(make_study(cells, dict(stabilizer='none'), **orders))
    means = {
        (c.labels['matrix'], c.labels['stabilizer'], c.lr): c.difference
        and c.difference.mean
        for c in found
    }
    assert means == {
        ('a', 'none', 1.0): None,
        ('a', 'none', 2.0): None,
        ('a', 'sn', 1.0): 0.5,
        ('a', 'sn', 2.0): 0.25,
        ('b', 'sn', 1.0): None,
    }
