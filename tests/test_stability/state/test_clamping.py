"""Clamped eigenvalues, dense matrices and their fit to a structure."""

import math

import pytest
import torch
from stability_oracles import (
    assert_printed,
    batch_of,
    detmat,
    double,
    sorted_eigenvalues,
)

from mmstabvim.stability import (
    clamp_matrix,
    clamp_real_part,
    continuous_margin,
    numerical_abscissa,
    spectral_abscissa,
    stability_penalty,
    straight_through,
)
from mmstabvim.stability.state import clamping

METHODS = ('eig', 'schur', 'shift')


def spectrum(count=200):
    """Complex numbers on both sides of the axis."""
    return torch.complex(*(4 * detmat(2, count)))


def jordan(eta=0.0):
    return double([[0.5, 1], [eta, 0.5]])


def test_direction_of_the_rule():
    """The larger part is cut off, not the smaller."""
    a = double([-5, -0.5, 3])
    assert clamp_real_part(a, 0.01).tolist() == [-5, -0.5, -0.01]
    assert clamp_real_part(a, 0.01, 2.0).tolist() == [-2, -0.5, -0.01]


@pytest.mark.parametrize('lambda_max', [None, 1.5])
def test_complex_real_part(lambda_max):
    values = spectrum()
    clamped = clamp_real_part(values, 0.1, lambda_max)
    assert torch.equal(clamped.imag, values.imag)
    inside = values.real <= -0.1
    if lambda_max is not None:
        inside &= values.real >= -lambda_max
        assert (clamped.real >= -lambda_max).all()
    assert 0 < inside.sum() < len(values)
    assert torch.equal(clamped[inside], values[inside])
    assert (clamped.real <= -0.1).all()


def rule(values, **options):
    return clamp_real_part(values, 0.1, 1.5, **options)


@pytest.mark.parametrize('kind', ['real', 'complex'])
@pytest.mark.parametrize('precision', [32, 64])
def test_rule_is_idempotent(precision, kind):
    """Bitwise, and conjugate spectra stay conjugate."""
    values = spectrum() if kind == 'complex' else spectrum().real
    if precision == 32:
        narrow = torch.complex64 if kind == 'complex' else torch.float32
        values = values.to(narrow)
    once = rule(values)
    assert once.dtype == values.dtype
    assert not torch.equal(once, values)
    assert torch.equal(rule(once), once)
    if kind == 'complex':
        conjugate = rule(values.conj().resolve_conj())
        assert torch.equal(conjugate, once.conj().resolve_conj())


@pytest.mark.parametrize('kind', ['real', 'complex'])
def test_gradient_of_the_rule(kind):
    """Exact where it exists; straight through by option."""
    values = spectrum(24) if kind == 'complex' else spectrum(24).real
    values = values.contiguous().requires_grad_()
    assert torch.autograd.gradcheck(rule, (values,))
    through = rule(values, ste=True)
    assert torch.equal(through, rule(values))
    through.backward(torch.ones_like(values))
    assert torch.equal(values.grad, torch.ones_like(values))


def test_clamped_values_have_no_gradient():
    values = double([-5, -0.5, 3]).requires_grad_()
    clamp_real_part(values, 0.01, 2.0).sum().backward()
    assert values.grad.tolist() == [0, 1, 0]


def test_zero_eigenvalue_has_a_finite_gradient():
    values = torch.zeros(2, dtype=torch.complex128, requires_grad=True)
    out = rule(values)
    torch.view_as_real(out).sum().backward()
    assert torch.view_as_real(values.grad).isfinite().all()


def test_straight_through():
    x = double([1e8, 0.1]).requires_grad_()
    value = double([-0.01, 0.3]).requires_grad_()
    out = straight_through(x, value)
    assert torch.equal(out, value)  # x + (value - x) would round
    (out * double([2, 3])).sum().backward()
    assert x.grad.tolist() == [2, 3]
    assert value.grad is None
    for other in (value[:1], value.float()):
        with pytest.raises(ValueError, match='clamped must be as x'):
            straight_through(x, other)


def test_discrete_rule_keeps_the_phase():
    """The continuous rule and the literal one on the exponential agree."""
    values, delta, margin = spectrum(), 0.05, 0.02
    discrete = torch.exp(delta * values)
    literal = discrete * ((1 - margin) / discrete.abs()).clamp(max=1)
    clamped = clamp_real_part(values, continuous_margin(margin, delta))
    torch.testing.assert_close(
        torch.exp(delta * clamped), literal, rtol=1e-12, atol=0
    )
    assert (literal != discrete).any()


def test_margin_as_a_rate():
    assert continuous_margin(0.01, 1e-3) == pytest.approx(10.0503358535)
    assert continuous_margin(0.0, 0.1) == 0
    assert math.copysign(1, continuous_margin(0.0, 0.1)) == 1
    # what is left after 197 tokens at the reference step
    for margin, kept in ((0.01, 0.138), (1e-3, 0.821)):
        rate = continuous_margin(margin, 0.1)
        assert math.exp(-rate * 0.1 * 197) == pytest.approx(kept, abs=5e-4)


@pytest.mark.parametrize('method', METHODS)
def test_normal_pair(method):
    A = double([[1, 2], [-2, 1]])
    clamped = clamp_matrix(A, 0.1, method=method)
    assert_printed(clamped, [[-0.1, 2], [-2, -0.1]])


@pytest.mark.parametrize(
    ('method', 'wanted', 'distance'),
    [
        ('eig', [[-0.1, 3.625], [0, -3]], math.hypot(1.1, 1.375)),
        ('schur', [[-0.1, 5], [0, -3]], 1.1),
        ('shift', [[-0.1, 5], [0, -4.1]], 1.1 * math.sqrt(2)),
    ],
)
def test_triangular(method, wanted, distance):
    A = double([[1, 5], [0, -3]])
    clamped = clamp_matrix(A, 0.1, method=method)
    assert_printed(clamped, wanted)
    assert_printed(torch.linalg.matrix_norm(clamped - A), distance)


@pytest.mark.parametrize(
    ('method', 'distance'),
    [('eig', 2.02634316), ('schur', 1.99031272), ('shift', 2.81472724)],
)
def test_four_by_four(method, distance):
    A = detmat(4, 4)
    clamped = clamp_matrix(A, 0.1, method=method)
    # 'shift' moves the two stable ones as well
    moved = 1.4073636183 if method == 'shift' else 0.0
    wanted = [
        -0.1 + 0.4573171527j,
        -0.1 - 0.4573171527j,
        -0.8828691263 - moved,
        -1.8825587884 - moved,
    ]
    assert_printed(sorted_eigenvalues(clamped), wanted)
    norm = torch.linalg.matrix_norm(clamped - A).item()
    assert norm == pytest.approx(distance, abs=5.1e-9)
    change = torch.linalg.vector_norm(
        sorted_eigenvalues(A) - sorted_eigenvalues(clamped)
    )
    if method != 'eig':
        assert norm == pytest.approx(change.item(), abs=1e-9)


def test_eig_is_discontinuous_at_a_defective_matrix():
    """Two real eigenvalues lose their coupling, a complex pair keeps it."""
    eta = 1e-10

    def clamped(eta):
        return clamp_matrix(jordan(eta), 0.1, kappa_max=1e12)

    assert_printed(clamped(-eta), [[-0.1, 1], [-eta, -0.1]])
    lost = clamped(eta)
    torch.testing.assert_close(
        lost, -0.1 * torch.eye(2).double(), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize('eta', [-1e-10, 0.0, 1e-10])
@pytest.mark.parametrize('method', METHODS)
def test_ill_conditioned_falls_back(method, eta):
    """Above kappa_max ``'eig'`` is ``'schur'``, so it is continuous."""
    found = clamp_matrix(jordan(eta), 0.1, method=method)
    wanted = double([[-0.1, 1], [0, -0.1]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)


def test_equal_eigenvalues_fall_back():
    """Their gradient in the eigenbasis would not be finite."""
    A = torch.diag(double([0.5, 0.5, -1])).requires_grad_()
    clamped = clamp_matrix(A, 0.1)
    assert_printed(clamped, torch.diag(double([-0.1, -0.1, -1])))
    clamped.sum().backward()
    assert torch.equal(A.grad, torch.ones(3, 3).double())


def test_change_that_is_not_real_falls_back(monkeypatch):
    A = detmat(4, 4)
    wanted = clamp_matrix(A, 0.1, method='schur')
    assert not torch.equal(clamp_matrix(A, 0.1), wanted)
    real = clamping._eig_change
    monkeypatch.setattr(
        clamping, '_eig_change', lambda *args: real(*args) + 1e-3j
    )
    assert torch.equal(clamp_matrix(A, 0.1), wanted)


@pytest.mark.parametrize('lambda_max', [None, 1.0])
@pytest.mark.parametrize('method', METHODS)
def test_batch(method, lambda_max):
    """Bound kept; matrices that keep it already stay bitwise."""
    if method == 'shift' and lambda_max is not None:
        return
    A = batch_of(30, 6) - 2 * torch.eye(6)
    A = A.reshape(5, 3, 2, 6, 6)
    values = torch.linalg.eigvals(A).real
    fine = values.amax(-1) <= -0.1
    if lambda_max is not None:
        fine &= values.amin(-1) >= -lambda_max
        A[0, 0, 0] = -0.5 * torch.eye(6)
        fine[0, 0, 0] = True
    assert 0 < fine.sum() < 30
    clamped = clamp_matrix(A, 0.1, lambda_max, method)
    assert torch.equal(clamped[fine], A[fine])
    assert (clamped[~fine] != A[~fine]).any(-1).any(-1).all()
    values = torch.linalg.eigvals(clamped)
    assert (values.real.amax(-1) <= -0.1 + 1e-8).all()
    if lambda_max is not None:
        assert (values.real.amin(-1) >= -lambda_max - 1e-4).all()


def test_imaginary_parts_and_stable_eigenvalues_stay():
    A = batch_of(20, 5)
    for method in ('eig', 'schur'):
        clamped = clamp_matrix(A, 0.1, method=method)
        for before, after in zip(A, clamped, strict=True):
            wanted = torch.linalg.eigvals(before)
            wanted = clamp_real_part(wanted, 0.1)
            found = torch.linalg.eigvals(after)
            distance = (found[:, None] - wanted).abs()
            # both ways: every one is found, none is new
            assert distance.amin(0).max() < 1e-5
            assert distance.amin(1).max() < 1e-5


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('method', METHODS)
def test_matrices_are_idempotent(method, dtype):
    A = batch_of(40, 6).to(dtype)
    once = clamp_matrix(A, 0.1, method=method)
    assert once.dtype == dtype
    twice = clamp_matrix(once, 0.1, method=method)
    kappa = torch.linalg.cond(torch.linalg.eig(once.double())[1])
    # 'schur' makes nearly defective ones, determined to less than the slack
    loose = kappa > (1e3 if dtype == torch.float32 else 1e9)
    assert method == 'schur' or not loose.any()
    assert loose.sum() < 20
    assert torch.equal(twice[~loose], once[~loose])
    assert not torch.equal(once, A)


@pytest.mark.parametrize('method', ['eig', 'shift'])
def test_gradient_of_matrices(method):
    A = batch_of(3, 4).requires_grad_()

    def clamped(A):
        return clamp_matrix(A, 0.1, 1.0 if method == 'eig' else None, method)

    assert torch.autograd.gradcheck(clamped, (A,))


@pytest.mark.parametrize('method', METHODS)
def test_straight_through_matrices(method):
    A = detmat(4, 4).requires_grad_()
    out = clamp_matrix(A, 0.1, method=method, ste=True)
    assert torch.equal(out, clamp_matrix(A, 0.1, method=method))
    out.sum().backward()
    assert torch.equal(A.grad, torch.ones_like(A))


def test_schur_passes_the_gradient_straight_through():
    """Also for the matrices of a batch that stay, and in both orders."""
    stable = -torch.eye(4).double()
    A = torch.stack((detmat(4, 4), stable)).requires_grad_()
    clamp_matrix(A, 0.1, method='schur').sum().backward()
    assert torch.equal(A.grad, torch.ones_like(A))


def test_values_do_not_depend_on_whether_gradients_are_wanted():
    A = torch.stack((torch.block_diag(jordan(), jordan()), detmat(4, 4)))
    for method in METHODS:
        wanted = clamp_matrix(A, 0.1, method=method)
        found = clamp_matrix(A.clone().requires_grad_(), 0.1, method=method)
        assert torch.equal(found, wanted)


def test_penalty_of_clamped_matrices_is_zero():
    A = batch_of(10, 4)
    for method in METHODS:
        values = torch.linalg.eigvals(clamp_matrix(A, 0.0, method=method))
        assert stability_penalty(values, 1e-4) == 0


def test_low_precision_and_autocast():
    A = detmat(4, 4)
    for method in METHODS:
        wanted = clamp_matrix(A.float(), 0.1, method=method)
        with torch.autocast('cpu', torch.bfloat16):
            found = clamp_matrix(A.float(), 0.1, method=method)
        assert torch.equal(found, wanted)
        low = clamp_matrix(A.bfloat16(), 0.1, method=method)
        assert low.dtype == torch.float32


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_non_finite_eigenvalues_raise(bad):
    """A minimum would clamp an infinity away."""
    message = '^eigenvalues must be finite, got 1 NaN or infinite values of 2'
    with pytest.raises(ValueError, match=message):
        rule(torch.tensor([-1.0, bad]))
    with pytest.raises(ValueError, match=message):
        rule(torch.tensor([-1.0, complex(-1, bad)]))


@pytest.mark.parametrize('method', METHODS)
def test_non_finite_matrices_raise(method):
    A = batch_of(2, 3)
    A[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r'^A must be finite'):
        clamp_matrix(A, method=method)


def test_bounds_out_of_range():
    one = torch.ones(1)
    A = detmat(2, 2)
    for function, x in ((clamp_real_part, one), (clamp_matrix, A)):
        with pytest.raises(ValueError, match='eps must be >= 0'):
            function(x, -0.1)
        with pytest.raises(ValueError, match='eps must be >= 0'):
            function(x, math.nan)
        message = r'lambda_max must be at least eps=0\.5, got 0\.1'
        with pytest.raises(ValueError, match=message):
            function(x, 0.5, 0.1)
    for margin in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match='margin must be in'):
            continuous_margin(margin, 0.1)
    for delta_ref in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match='delta_ref must be positive'):
            continuous_margin(0.1, delta_ref)


def test_bad_matrix_arguments():
    A = detmat(4, 4)
    choices = r"method must be one of \('eig', 'schur', 'shift'\), got 'qr'"
    with pytest.raises(ValueError, match=choices):
        clamp_matrix(A, method='qr')
    with pytest.raises(ValueError, match='lambda_max needs method'):
        clamp_matrix(A, 0.1, 1.0, 'shift')
    with pytest.raises(ValueError, match=r'A must be \(\.\.\., N, N\)'):
        clamp_matrix(A[:3])
    with pytest.raises(ValueError, match='A must be real'):
        clamp_matrix(A + 0j)


def test_shift_bounds_more_than_the_abscissa():
    """It leaves the numerical abscissa below what it was."""
    A = batch_of(5, 4)
    shifted = clamp_matrix(A, 0.1, method='shift')
    moved = numerical_abscissa(A) - numerical_abscissa(shifted)
    torch.testing.assert_close(moved, spectral_abscissa(A) + 0.1)


@pytest.mark.parametrize(
    'dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16]
)
def test_bounds_are_rounded_inwards(dtype):
    """Stored values obey in exact arithmetic."""
    for eps, lambda_max in ((0.01, 0.3), (0.1, 0.7), (0.3, 1.1)):
        low = clamp_real_part(
            torch.full((1,), -9.0, dtype=dtype), eps, lambda_max
        )
        high = clamp_real_part(torch.zeros(1, dtype=dtype), eps, lambda_max)
        assert low.double() >= -lambda_max
        assert high.double() <= -eps
        assert low.item() == pytest.approx(-lambda_max, rel=0.01)
        assert high.item() == pytest.approx(-eps, rel=0.01)
