"""Spectral normalization: scale and shift."""

import math

import pytest
import torch
from stability_oracles import (
    assert_printed,
    batch_of,
    detmat,
    double,
)

from mmstabvim.stability import (
    abscissa_shift,
    discrete_shift,
    log_radius_scale,
    radius_scale,
    spectral_abscissa,
    spectral_radius,
    stability_penalty,
)


def scaled(A, rho_max=1.0, **options):
    """A diagonal of one channel per row, normalized."""
    return A / radius_scale(A.abs().amax(-1), rho_max, **options)[..., None]


def scaled_matrix(A, rho_max=1.0):
    return A / radius_scale(spectral_radius(A), rho_max)[..., None, None]


def shifted_matrix(A, *args, **options):
    shift = discrete_shift(spectral_abscissa(A), *args, **options)
    return A - shift[..., None, None] * torch.eye(A.shape[-1], dtype=A.dtype)


def test_s4d_real():
    A = -torch.arange(1, 17).double()
    assert_printed(scaled(A), A / 16)


def test_rows():
    A = double([[1, 2, 4], [0.25, 0.5, 0.75]])
    assert_printed(scaled(A), [[0.25, 0.5, 1], [0.25, 0.5, 0.75]])
    assert_printed(scaled(A, 2.0), [[0.5, 1, 2], [0.25, 0.5, 0.75]])
    assert torch.equal(scaled(A, 2.0)[1], A[1])
    bounds = double([4, 0.375])
    assert_printed(scaled(A, bounds), [[1, 2, 4], [0.125, 0.25, 0.375]])


def test_within_the_bound_nothing_changes():
    for A in (torch.zeros(3, 3), 0.5 * detmat(3, 3), 0.99 * torch.eye(3)):
        scale = radius_scale(spectral_radius(A), 1.0)
        assert scale.item() == 1
        assert torch.equal(scaled_matrix(A), A)


def test_dividing_does_not_make_stable():
    """A positive factor keeps the sign: +2 becomes +1."""
    assert scaled(double([2, -1])).tolist() == [1.0, -0.5]


def test_radius_below_one_may_still_grow():
    """Why stability is not claimed from the spectral radius."""
    A = double([[0.9, 100], [0, 0.9]])
    assert torch.equal(scaled_matrix(A), A)
    norms = [
        torch.linalg.matrix_norm(torch.linalg.matrix_power(A, k), 2)
        for k in range(1, 30)
    ]
    peak = max(range(29), key=norms.__getitem__)
    assert peak + 1 == 9
    assert_printed(norms[peak], 387.4208764)
    jordan = torch.linalg.matrix_power(double([[1, 1], [0, 1]]), 100)
    assert_printed(torch.linalg.matrix_norm(jordan, 2), 100.0099990)


def test_memory_of_the_slowest_mode():
    """Scaling A by 1/16 is 16 times the memory, at S4D-Real."""
    A = -torch.arange(1, 17).double()
    slow = scaled(A).amax()
    for delta, before, after in ((0.01, 0.1395, 0.8842), (0.1, None, 0.2919)):
        if before:
            kept = math.exp(A.amax() * delta * 197)
            assert kept == pytest.approx(before, abs=5e-5)
        kept = math.exp(slow * delta * 197)
        assert kept == pytest.approx(after, abs=5e-5)


@pytest.mark.parametrize('rho_max', [0.3, 1.0, 7.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_idempotent(dtype, rho_max):
    """Bitwise, for diagonals, logarithms and dense matrices."""
    A = (37 * batch_of(50, 8)).to(dtype)
    once = scaled(A, rho_max)
    assert not torch.equal(once, A)
    assert torch.equal(scaled(once, rho_max), once)
    assert (once.abs() <= rho_max * (1 + 1e-6)).all()
    once = scaled_matrix(A, rho_max)
    assert torch.equal(scaled_matrix(once, rho_max), once)
    assert (spectral_radius(once) <= rho_max * (1 + 2e-6)).all()


@pytest.mark.parametrize('rho_max', [1e-20, 1.0, 16.0, 1e29])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_logarithms(dtype, rho_max):
    """Exact, idempotent, and without overflow where exp does."""
    log = (100 * detmat(200, 16)).to(dtype)

    def normalized(x):
        excess = log_radius_scale(x.amax(-1), rho_max)[:, None]
        return (x - excess).to(dtype)

    once = normalized(log)
    wanted = log - torch.relu(log.amax(-1, True) - math.log(rho_max))
    torch.testing.assert_close(once, wanted)
    assert torch.equal(normalized(once), once)
    as_tensor = log_radius_scale(log.amax(-1), double(rho_max))
    torch.testing.assert_close(
        as_tensor, log_radius_scale(log.amax(-1), rho_max)
    )
    below = log.amax(-1) <= math.log(rho_max)
    assert torch.equal(once[below], log[below])


def test_slack():
    """A relative 1e-6, in all three."""
    radius = double([2 * (1 + 9e-7), 2 * (1 + 2e-6)])
    assert (radius_scale(radius, 2.0) > 1).tolist() == [False, True]
    found = log_radius_scale(radius.log(), 2.0)
    assert (found > 0).tolist() == [False, True]
    excess = double([9e-7, 2e-6])
    assert discrete_shift(excess).tolist() == [0, 2e-6]
    target = math.log(0.1) / 0.1  # -23
    shift = discrete_shift(target + 20 * excess, 0.1, 0.1)
    assert (shift > 0).tolist() == [False, True]


def test_logarithm_agrees_with_the_scale():
    radius = detmat(1, 50, 3).abs()[0] * 4
    scale = log_radius_scale(radius.log(), 1.5).exp()
    torch.testing.assert_close(scale, radius_scale(radius, 1.5))


def test_homogeneous():
    """Any multiple beyond the bound gives the same matrix."""
    A = 5 * detmat(6, 6)
    torch.testing.assert_close(scaled_matrix(A), scaled_matrix(3 * A))


def test_gradient_goes_through_the_scale():
    A = (3 * batch_of(3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(scaled_matrix, (A,))
    row = double([1, -4, 2]).requires_grad_()
    weight = double([1, 1, 1])
    (scaled(row) * weight).sum().backward()
    # (a_1 + a_2 + a_3) / |a_2|: only the largest entry feels the scale
    assert_printed(row.grad, [0.25, 0.25 + -1 / 16, 0.25])
    row.grad = None
    (scaled(row, detach=True) * weight).sum().backward()
    assert_printed(row.grad, [0.25, 0.25, 0.25])
    row.grad = None
    scaled(row, 10.0).sum().backward()
    assert_printed(row.grad, [1, 1, 1])


def test_gradient_of_the_logarithm():
    log = double([1, 2]).requires_grad_()
    log_radius_scale(log, math.e).sum().backward()
    assert log.grad.tolist() == [0, 1]
    assert not log_radius_scale(log, 1.0, detach=True).requires_grad


def test_dividing_the_exponential_is_a_shift():
    A, delta = detmat(4, 4), 0.3
    exponential = torch.linalg.matrix_exp(delta * A)
    radius = spectral_radius(exponential)
    assert_printed(radius, 1.4802471773)
    shifted = torch.linalg.matrix_exp(delta * shifted_matrix(A))
    error = (exponential / radius - shifted).abs().max()
    assert error <= 4e-15


@pytest.mark.parametrize('rho_max', [1.0, 0.9])
def test_bound_of_the_discrete_matrix(rho_max):
    """At every step size for 1, at delta_ref and above for less."""
    A = batch_of(20, 4) - 1.2 * torch.eye(4)
    shifted = shifted_matrix(A, rho_max, 0.1)
    for delta in (0.01, 0.1, 0.7):
        radius = spectral_radius(torch.linalg.matrix_exp(delta * shifted))
        assert (radius <= rho_max ** (delta / 0.1) * (1 + 1e-6)).all()
    unstable = spectral_abscissa(A) > 0
    assert 0 < unstable.sum() < 20
    if rho_max == 1:
        assert torch.equal(shifted[~unstable], A[~unstable])


@pytest.mark.parametrize(('rho_max', 'delta_ref'), [(1.0, None), (0.99, 0.1)])
def test_shift_is_idempotent(rho_max, delta_ref):
    A = batch_of(50, 6)
    once = shifted_matrix(A, rho_max, delta_ref)
    assert not torch.equal(once, A)
    assert torch.equal(shifted_matrix(once, rho_max, delta_ref), once)


def test_shift_of_large_entries_is_idempotent_in_float32():
    """Rounding moves eigenvalues by more than an absolute 1e-6."""
    A = 300 * batch_of(50, 6).float()

    def shifted(A):
        scale = torch.linalg.matrix_norm(A)
        return shifted_matrix(A, scale=scale)

    once = shifted(A)
    assert torch.equal(shifted(once), once)
    twice = shifted_matrix(shifted_matrix(A))
    assert not torch.equal(twice, shifted_matrix(A))


def test_shift_values_and_gradient():
    abscissa = double([-1.0, 0.0, 0.5, 2.0]).requires_grad_()
    assert discrete_shift(abscissa).tolist() == [0, 0, 0.5, 2]
    target = math.log(0.5) / 0.2
    shift = discrete_shift(abscissa, 0.5, 0.2)
    assert_printed(shift, abscissa.detach() - target)
    discrete_shift(abscissa).sum().backward()
    assert abscissa.grad.tolist() == [0, 0, 1, 1]
    assert not discrete_shift(abscissa, detach=True).requires_grad
    A = (batch_of(3, 3) + 2 * torch.eye(3)).requires_grad_()
    assert torch.autograd.gradcheck(shifted_matrix, (A,))


def test_penalty_before_and_after():
    """Why the penalty looks at raw parameters."""
    a = double([2, -4, 0.5])
    assert_printed(stability_penalty(a), 2.48)
    assert_printed(stability_penalty(scaled(a)), 0.605)
    assert_printed(stability_penalty(scaled(a).clamp(max=-0.01)), 0.0)


def test_nan_stays_nan():
    nan = double([torch.nan])
    assert radius_scale(nan, 1.0).isnan()
    assert log_radius_scale(nan, 1.0).isnan()
    assert discrete_shift(nan).isnan()


@pytest.mark.parametrize('rho_max', [0.0, -1.0, math.nan, math.inf])
def test_rho_max_must_be_positive(rho_max):
    one = torch.ones(1)
    message = 'rho_max must be positive'
    for function in (radius_scale, log_radius_scale, discrete_shift):
        with pytest.raises(ValueError, match=message):
            function(one, rho_max)


def test_bad_arguments():
    one = torch.ones(1)
    for function in (radius_scale, log_radius_scale):
        with pytest.raises(ValueError, match='rho_max must be positive'):
            function(one, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r'rho_max must be in \(0, 1\]'):
        discrete_shift(one, 1.5)
    with pytest.raises(ValueError, match='rho_max < 1 needs delta_ref'):
        discrete_shift(one, 0.5)
    for bad in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match='delta_ref must be positive'):
            discrete_shift(one, 0.5, bad)


def test_abscissa_shift():
    """Zero within the tolerance, which may differ from matrix to matrix."""
    abscissa = double([-1, 0.5, 0.5]).requires_grad_()
    shift = abscissa_shift(abscissa, -0.25, double([0, 0, 1]))
    assert shift.tolist() == [0, 0.75, 0]
    shift.sum().backward()
    assert abscissa.grad.tolist() == [0, 1, 0]
    assert abscissa_shift(double([-0.25, torch.nan]), -0.25)[0] == 0
    assert abscissa_shift(double([torch.nan]), -0.25).isnan()
