"""The stability penalty and its surrogate."""

import math

import pytest
import torch
from stability_oracles import (
    assert_printed,
    batch_of,
    detmat,
    double,
    normal_and_coupled,
)

from mmstabvim.stability import (
    numerical_abscissa_penalty,
    stability_penalty,
)


def test_signed_diagonal():
    a = double([[0.5, -1, 0.02], [0.005, 0.01, -3]]).requires_grad_()
    penalty = stability_penalty(a)
    assert_printed(penalty, 0.50)
    penalty.backward()
    # none at Re lambda = eps either
    assert a.grad.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert_printed(stability_penalty(a, reduction='mean'), 0.5 / 6)


def test_dense():
    A = detmat(4, 4).requires_grad_()
    values = torch.linalg.eigvals(A)
    penalty = stability_penalty(values)
    assert_printed(penalty, 2.5947272367)
    penalty.backward()
    row = [0.8931027007, -0.1906991998, -0.1768917746, -0.3307918526]
    assert_printed(A.grad[0], row)
    assert_printed(A.grad.trace(), 2.0)


def test_trace_of_the_gradient_counts():
    A = batch_of(15, 5).requires_grad_()
    values = torch.linalg.eigvals(A)
    stability_penalty(values, -0.3).backward()
    trace = A.grad.diagonal(dim1=-2, dim2=-1).sum(-1)
    active = (values.real > -0.3).sum(-1)
    assert 0 < active.amin() < active.amax()
    torch.testing.assert_close(trace, active.double())


@pytest.mark.parametrize('eta', [1e-4, 1e-8, 0.0, -1e-4])
def test_sum_over_a_cluster_is_smooth_where_the_largest_is_not(eta):
    A = double([[0.5, 1], [eta, 0.5]]).requires_grad_()
    stability_penalty(torch.linalg.eigvals(A)).backward()
    torch.testing.assert_close(
        A.grad, torch.eye(2).double(), rtol=0, atol=1e-8
    )
    if eta == 1e-8:
        A.grad = None
        torch.linalg.eigvals(A).real.amax().backward()
        assert A.grad.abs().max() == pytest.approx(5e3, rel=1e-3)


def test_negative_exponential_is_never_penalized():
    A_log = double([0, 1, -5]).requires_grad_()
    penalty = stability_penalty(-A_log.exp())
    penalty.backward()
    assert penalty == 0
    assert not A_log.grad.any()
    A_log.grad = None
    margin = stability_penalty(-A_log.exp(), -0.01)
    margin.backward()
    assert_printed(margin, 0.0032620530)
    assert_printed(A_log.grad, [0, 0, -math.exp(-5)])


def test_tolerated_growth():
    """An eigenvalue at the threshold still grows over an image."""
    assert stability_penalty(double([0.01]), 0.01) == 0
    growth = math.exp(0.01 * 0.1 * 197)
    assert growth == pytest.approx(1.218, abs=5e-4)


def test_pairs_agree_with_the_dense_matrix():
    """A stored eigenvalue of a pair stands for two."""
    stored = torch.tensor([0.3 + 2j, -1 + 1j], dtype=torch.complex128)
    both = torch.cat((stored, stored.conj()))
    for eps in (0.01, -2.0):
        dense = stability_penalty(both, eps)
        assert_printed(stability_penalty(stored, eps, pairs=True), dense)
        mean = stability_penalty(both, eps, 'mean')
        pair_mean = stability_penalty(stored, eps, 'mean', pairs=True)
        assert_printed(pair_mean, mean)


def test_numerical_abscissa():
    """Above 0 for a stable matrix that is not contracting."""
    A = normal_and_coupled().requires_grad_()
    assert stability_penalty(torch.linalg.eigvals(A)) == 0
    penalty = numerical_abscissa_penalty(A)
    assert_printed(penalty, 0.1865214236 - 0.01)
    penalty.backward()
    assert A.grad.norm() <= 1 + 1e-12
    batch = batch_of(7, 4).requires_grad_()
    each = torch.stack([numerical_abscissa_penalty(a) for a in batch])
    assert_printed(numerical_abscissa_penalty(batch), each.sum())
    mean = numerical_abscissa_penalty(batch, reduction='mean')
    assert_printed(mean, each.mean())
    values = torch.linalg.eigvals(batch).real.amax(-1)
    assert (each >= torch.relu(values - 0.01)).all()


def test_numerical_abscissa_gradient_stays_bounded():
    A = double([[0.5, 1], [1e-8, 0.5]]).requires_grad_()
    numerical_abscissa_penalty(A).backward()
    assert A.grad.norm() <= 1 + 1e-12


def test_gradcheck():
    A = (batch_of(3, 4) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(numerical_abscissa_penalty, (A,))
    assert torch.autograd.gradcheck(
        lambda a: stability_penalty(torch.linalg.eigvals(a)), (A,)
    )


def test_precision():
    """Half precision sums in float32."""
    a = torch.full((5001,), 1.0, dtype=torch.float16, requires_grad=True)
    assert stability_penalty(a, 0.0).item() == 5001
    assert stability_penalty(a).dtype == torch.float32
    assert stability_penalty(a.double()).dtype == torch.float64


def test_nan_stays_nan():
    values = double([torch.nan, -1])
    assert stability_penalty(values).isnan()


@pytest.mark.parametrize(
    ('penalty', 'x'),
    [
        (stability_penalty, torch.ones(2)),
        (numerical_abscissa_penalty, torch.eye(2)),
    ],
)
def test_unknown_reduction(penalty, x):
    message = r"reduction must be one of \('sum', 'mean'\), got 'none'"
    with pytest.raises(ValueError, match=message):
        penalty(x, reduction='none')


def test_non_finite_matrix():
    with pytest.raises(ValueError, match=r'^A must be finite'):
        numerical_abscissa_penalty(torch.eye(2) * torch.nan)
