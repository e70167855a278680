"""Growth of states, and bounds of it."""

import math

import pytest
import torch

from mmstabvim.stability import (
    decompose,
    growth_exponent,
    growth_exponent_bound,
    state_gain_bound,
)


def brute_force(delta, real):
    """The definition: all pairs of tokens s < t."""
    found = []
    for steps in delta:
        for d in range(steps.shape[1]):
            for rate in real[d % len(real)].tolist():
                sums = [0.0, *steps[:, d].cumsum(0).tolist()]
                found += [
                    rate * (sums[t] - sums[s])
                    for t in range(len(sums))
                    for s in range(t)
                ]
    return max(found)


@pytest.mark.parametrize('rows', [1, 3])
@pytest.mark.parametrize('shift', [-4.0, 0.0, 1.0])
def test_growth_is_its_definition(rows, shift):
    generator = torch.Generator().manual_seed(0)
    delta = torch.rand(2, 7, 3, generator=generator).double()
    real = torch.randn(rows, 4, generator=generator).double() + shift
    wanted = brute_force(delta, real)
    assert growth_exponent(delta, real).item() == pytest.approx(wanted)
    bound = growth_exponent_bound(delta.amax((0, 1)), real, 7)
    assert bound >= max(wanted, 0) - 1e-12


def test_longer_sequences_grow_in_proportion():
    delta = torch.full((1, 5, 2), 0.1)
    real = torch.tensor([[0.5], [-1.0]])
    assert growth_exponent(delta, real, 20).item() == pytest.approx(1.0)
    fading = growth_exponent(delta, -real.abs(), 20)
    assert fading.item() == pytest.approx(-0.05)


def test_bound_of_unknown_steps():
    """Infinite steps matter only where something grows."""
    steps = torch.tensor([math.inf, 1.0])
    real = torch.tensor([[-1.0], [0.5]])
    assert growth_exponent_bound(steps, real, 10).item() == 5
    assert growth_exponent_bound(steps, -real, 10).item() == math.inf


@pytest.mark.parametrize('alpha', [-1.0, -0.01, 0.0, 0.05])
def test_no_state_exceeds_the_gain(alpha):
    """The largest constant steps come closest."""
    one = torch.ones(()).double()
    for delta in (0.01, 0.3, 2.0):
        state = 0.0
        for length in range(1, 200):
            state = math.exp(delta * alpha) * state + delta
            bound = state_gain_bound(one, alpha * one, delta * one, length)
            assert state <= bound * (1 + 1e-12)
        if alpha < 0:
            assert state >= 0.6 * min(bound, delta * 200)


def test_a_transient_needs_the_condition_number():
    """[[-1, 100], [0, -2]] has abscissa -1, and a state of 33 for 1.1."""
    A = torch.tensor([[-1.0, 100.0], [0.0, -2.0]]).double()
    basis = decompose(A)
    one, delta = torch.ones(()).double(), torch.tensor(0.1).double()
    step, state = torch.linalg.matrix_exp(0.1 * A), torch.zeros(2).double()
    for _ in range(100):
        state = step @ state + 0.1 * torch.tensor([0.0, 1.0]).double()
    alone, bound = (
        state_gain_bound(kappa, -one, delta, math.inf)
        for kappa in (one, basis.condition)
    )
    assert alone < state.norm() <= bound


def test_bad_steps():
    with pytest.raises(ValueError, match='delta must not be negative'):
        growth_exponent(-torch.ones(1, 2, 3), torch.ones(3, 1))
    with pytest.raises(ValueError, match='dim differs'):
        growth_exponent(torch.ones(1, 2, 3), torch.ones(2, 1))
    with pytest.raises(
        ValueError, match=r'want delta \(\.\.\., length, dim\)'
    ):
        growth_exponent(torch.ones(2), torch.ones(2, 1))
