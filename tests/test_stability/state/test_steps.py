"""Diagnostics of step sizes and of the gradient through the state."""

import pytest
import torch
from stability_oracles import assert_printed, detmat, double

from mmstabvim.stability import (
    count_nonfinite,
    gradient_flow,
    matrix_exponential_scan,
    step_ranges,
)


def inputs(batch=2, length=7, dim=3, size=4):
    """Steps, and eigenvalues of both signs."""
    delta = detmat(batch * length, dim).abs().reshape(batch, length, dim)
    return delta, 2 * detmat(dim, size, 3)


def test_gradient_flow():
    """Modes that vanish, explode and do neither over 100 tokens."""
    delta = torch.full((2, 101, 4), 0.1, dtype=torch.float64)
    real = double([[-3, 1, -0.1, 0]]).repeat(4, 1)
    flow = gradient_flow(delta, real)
    assert flow.vanished == 0.25
    assert flow.exploding == 0.25
    all_real = double([[-3], [1], [-0.1], [0]])
    horizons = gradient_flow(delta, all_real, quantiles=(0, 1 / 3, 2 / 3, 1))
    assert_printed(horizons.horizon[:3], [1 / 0.3, 10, 100])
    assert horizons.horizon[3].isinf()


@pytest.mark.parametrize('reverse', [False, True])
def test_gradient_flow_is_that_of_the_first_token(reverse):
    """Compared with autograd: with B = 1 the gradient is step times gain."""
    delta, _ = inputs(batch=1, dim=1)
    delta[:, 0], delta[:, -1] = 30, 15  # only one of them counts
    values = torch.linspace(-2, 2, 12).double()[None]
    u = torch.ones_like(delta).requires_grad_()
    B = torch.ones(1, 7, 12).double()
    A = torch.diag(values[0])[None]
    _, last = matrix_exponential_scan(u, delta, A, B, B, reverse=reverse)
    first = -1 if reverse else 0
    gains = torch.stack(
        [
            torch.autograd.grad(mode, u, retain_graph=True)[0][0, first, 0]
            for mode in last[0, 0]
        ]
    )
    gains = (gains / delta[0, first, 0]).log()
    flow = gradient_flow(delta, values, reverse)
    assert_printed(flow.vanished, (gains < -20).double().mean())
    assert_printed(flow.exploding, (gains > 5).double().mean())
    assert 0 < flow.vanished < 1
    assert 0 < flow.exploding < 1
    other = gradient_flow(delta.flip(1), values, not reverse)
    assert_printed(other.vanished, flow.vanished)


@pytest.mark.parametrize('kind', ['stable', 'mixed', 'unstable', 'complex'])
def test_ranges_against_the_whole_product(kind):
    delta, values = inputs()
    if kind in ('stable', 'unstable'):
        values = values.abs() * (-1 if kind == 'stable' else 1)
    if kind == 'complex':
        values = torch.complex(values, detmat(3, 4, 8))
    delta[0, 0, 0] = 5e-5
    found = step_ranges(delta, values)
    product = delta[..., None] * values
    decay = torch.exp(product).abs()
    assert_printed(found.delta_min, 5e-5)
    assert_printed(found.delta_max, delta.amax())
    assert_printed(found.delta_mean, delta.mean())
    assert_printed(found.skipped, 1 / delta.numel())
    assert_printed(found.max_decay_exponent, product.real.abs().amax())
    assert_printed(found.decay_min, decay.amin())
    assert_printed(found.decay_max, decay.amax())
    phase = product.imag.abs().amax() if kind == 'complex' else double(0)
    assert_printed(found.max_phase, phase)


def test_nonfinite_counts():
    tensors = {
        'parameter': torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]),
        'steps': torch.zeros(3, 2),
        'state': torch.tensor([1j, complex(0, torch.nan)]),
        'label': torch.arange(3),
        'none': torch.zeros(0),
    }
    counts = count_nonfinite(tensors)
    assert list(counts) == list(tensors)
    assert [c.item() for c in counts.values()] == [3, 0, 1, 0, 0]
    assert tensors['parameter'].isnan().sum() == 1


def test_half_precision_and_gradients():
    """At least float32, and no gradient is recorded."""
    delta, values = inputs()
    delta = delta.to(torch.bfloat16).requires_grad_()
    values = values.float().requires_grad_()
    results = [*gradient_flow(delta, values), *step_ranges(delta, values)]
    assert {x.dtype for x in results} == {torch.float32}
    assert not any(x.requires_grad for x in results)


def test_nothing_waits_for_the_device():
    """Tensors without values go through, so no value is looked at."""
    delta = torch.empty(2, 7, 3, device='meta')
    values = torch.empty(3, 4, device='meta')
    results = [
        *gradient_flow(delta, values),
        *step_ranges(delta, values),
        *count_nonfinite({'delta': delta}).values(),
    ]
    assert {x.device.type for x in results} == {'meta'}


@pytest.mark.parametrize('function', [gradient_flow, step_ranges])
def test_bad_shapes(function):
    delta, values = inputs()
    for args in ((delta[0], values), (delta, values[:2])):
        with pytest.raises(ValueError, match='want delta'):
            function(*args)
