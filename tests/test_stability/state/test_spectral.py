"""Spectral radius, abscissa and their bounds."""

import math

import pytest
import torch
from stability_oracles import (
    assert_printed,
    batch_of,
    detmat,
    double,
    hippo,
    normal_and_coupled,
    sorted_eigenvalues,
)

from mmstabvim.stability import (
    decompose,
    eigenvalues,
    gelfand_bound,
    numerical_abscissa,
    spectral_abscissa,
    spectral_radius,
)

FUNCTIONS = (
    spectral_radius,
    spectral_abscissa,
    numerical_abscissa,
    gelfand_bound,
)


def test_deterministic_matrices():
    first = [0.8414709848, -0.7568024953, 0.4121184852]
    second = [-0.2879033167, -0.1323517501, -0.9917788534]
    assert_printed(detmat(2, 3, 0), [first, second])
    big, small = detmat(16, 16, 0), detmat(4, 4, 0)
    assert_printed(torch.linalg.matrix_norm(big, 2), 5.1523025259)
    assert_printed(spectral_radius(big), 2.9077054341)
    assert_printed(torch.linalg.matrix_norm(small, 2), 2.0679896840)
    assert_printed(spectral_abscissa(big), 2.5363733452)
    assert_printed(spectral_abscissa(small), 1.3073636183)
    assert_printed(spectral_radius(small), 1.8825587884)
    assert_printed(numerical_abscissa(small), 1.6930291190)
    assert_printed(
        sorted_eigenvalues(small),
        [
            1.3073636183 + 0.4573171527j,
            1.3073636183 - 0.4573171527j,
            -0.8828691263,
            -1.8825587884,
        ],
    )


def test_eigenvalues_of_the_example():
    """The printed gradient of the sum of relu(Re - 0.01)."""
    A = detmat(4, 4).requires_grad_()
    total = torch.relu(eigenvalues(A).real - 0.01).sum()
    total.backward()
    assert_printed(total, 2.5947272367)
    row = [0.8931027007, -0.1906991998, -0.1768917746, -0.3307918526]
    assert_printed(A.grad[0], row)
    assert_printed(A.grad.trace(), 2.0)


@pytest.mark.parametrize('eta', [1e-4, 1e-10, 0.0])
def test_gradients_of_eigenvalues_stay_bounded(eta):
    """Exact, or the numerical abscissa's where eigenvectors coincide."""
    A = double([[0.5, 1.0], [eta, 0.4 if eta == 1e-4 else 0.5]])
    A = torch.block_diag(A, double([[-1.0]])).requires_grad_()
    values = eigenvalues(A)
    with torch.no_grad():
        assert torch.equal(eigenvalues(A), values)
    values.real.max().backward()
    if eta == 1e-4:
        known = torch.autograd.functional.jacobian(
            lambda A: torch.linalg.eigvals(A).real.max(), A.detach()
        )
        assert_printed(A.grad, known)
        return
    assert decompose(A.detach()).cosine < 1e-4
    assert torch.linalg.matrix_norm(A.grad, 2) <= 1 + 1e-12
    symmetric = (A.detach() + A.detach().mT) / 2
    vector = torch.linalg.eigh(symmetric)[1][:, -1]
    assert_printed(A.grad, torch.outer(vector, vector))


def test_stable_matrix_with_positive_numerical_abscissa():
    A = normal_and_coupled()
    assert_printed(spectral_radius(A), 2.0339127010)
    assert_printed(spectral_abscissa(A), -0.3299883721)
    assert_printed(numerical_abscissa(A), 0.1865214236)
    assert_printed(torch.linalg.matrix_norm(A, 2), 2.2816494459)


@pytest.mark.parametrize('size', [1, 2, 3, 5])
def test_against_eigenvalues(size):
    """Every batch shape, and the order alpha <= mu <= norm, alpha <= rho."""
    A = batch_of(12, size).reshape(3, 2, 2, size, size)
    values = torch.linalg.eigvals(A)
    alpha, rho = spectral_abscissa(A), spectral_radius(A)
    assert alpha.shape == rho.shape == (3, 2, 2)
    torch.testing.assert_close(alpha, values.real.amax(-1))
    torch.testing.assert_close(rho, values.abs().amax(-1))
    mu = numerical_abscissa(A)
    norm = torch.linalg.matrix_norm(A, 2)
    for low, high in ((alpha, mu), (alpha, rho), (mu, norm), (rho, norm)):
        assert (low <= high + 1e-12).all()


@pytest.mark.parametrize('size', [1, 2, 4])
def test_complex_matrices(size):
    A = torch.complex(detmat(size, size, 1), detmat(size, size, 2))
    values = torch.linalg.eigvals(A)
    torch.testing.assert_close(spectral_radius(A), values.abs().amax())
    torch.testing.assert_close(spectral_abscissa(A), values.real.amax())
    unitary = torch.linalg.qr(A)[0]
    assert numerical_abscissa(unitary) <= 1 + 1e-12
    assert gelfand_bound(A) >= spectral_radius(A)


@pytest.mark.parametrize('scale', [1e-310, 1e-200, 1.0, 1e200, 1e307])
def test_two_by_two_neither_overflows_nor_underflows(scale):
    pair, real = double([[1, 2], [-2, 1]]), double([[1, 2], [3, 1]])
    for matrix, rho, alpha in (
        (pair, math.sqrt(5), 1.0),
        (real, 1 + math.sqrt(6), 1 + math.sqrt(6)),
        (-real, 1 + math.sqrt(6), -1 + math.sqrt(6)),
    ):
        bound = {'rtol': 1e-12, 'atol': 0}
        A = matrix * scale
        wanted = double([rho * scale, alpha * scale])
        found = torch.stack((spectral_radius(A), spectral_abscissa(A)))
        torch.testing.assert_close(found, wanted, **bound)


@pytest.mark.parametrize('size', [1, 2, 3, 4])
@pytest.mark.parametrize(
    'function', [spectral_radius, spectral_abscissa, numerical_abscissa]
)
def test_gradients(function, size):
    A = batch_of(3, size).requires_grad_()
    assert torch.autograd.gradcheck(function, (A,))
    assert torch.autograd.gradgradcheck(function, (A,))


def test_gradient_of_the_radius_by_left_and_right_vectors():
    A = detmat(5, 5, 3).requires_grad_()
    values, right = torch.linalg.eig(A.detach())
    top = values.abs().argmax()
    x = right[:, top]
    y = torch.linalg.inv(right)[top].conj()
    phase = values[top].conj() / values[top].abs()
    wanted = (phase * torch.outer(y.conj(), x) / (y.conj() @ x)).real
    # conj(y) x^T belongs to d lambda = y^H dA x / (y^H x)
    spectral_radius(A).backward()
    torch.testing.assert_close(A.grad, wanted)


@pytest.mark.parametrize('function', [spectral_radius, spectral_abscissa])
@pytest.mark.parametrize(
    'matrix',
    [
        torch.zeros(2, 2),
        -torch.eye(2),
        torch.tensor([[0.5, 1], [0, 0.5]]),
        torch.zeros(3, 3),
        torch.diag(torch.ones(2), 1),
        torch.diag(torch.ones(3), 1) - torch.eye(4),
    ],
    ids=['zero', 'scalar', 'jordan', 'zero 3', 'nilpotent 3', 'jordan 4'],
)
def test_no_gradient_is_not_finite(function, matrix):
    """Also beside a matrix that has one, which keeps it."""
    other = detmat(*matrix.shape, 2)
    A = torch.stack((matrix.double(), other)).requires_grad_()
    function(A).sum().backward()
    assert A.grad.isfinite().all()
    alone = other.clone().requires_grad_()
    function(alone).backward()
    torch.testing.assert_close(A.grad[1], alone.grad)


def test_values_do_not_depend_on_whether_gradients_are_wanted():
    A = torch.stack((torch.diag(torch.ones(2), 1), torch.eye(3))).double()
    wanted = spectral_abscissa(A)
    assert torch.equal(spectral_abscissa(A.requires_grad_()), wanted)


@pytest.mark.parametrize(
    ('matrix', 'bounds'),
    [
        (hippo(8), (25.748163, 9.085063, 8.063854)),
        (detmat(16, 16), (3.921156, 2.940862, 2.909772)),
        (double([[0, 4], [0, 0]]), (0, 0, 0)),
    ],
    ids=['hippo', 'detmat', 'nilpotent'],
)
def test_gelfand_bound(matrix, bounds):
    for k, wanted in zip((2, 6, 10), bounds, strict=True):
        found = gelfand_bound(matrix, k).item()
        assert found == pytest.approx(wanted, abs=6e-7)


def test_gelfand_bound_is_one_and_shrinks():
    assert_printed(torch.linalg.matrix_norm(hippo(8), 2), 40.8099289)
    A = torch.stack((detmat(8, 8, 4), hippo(8), torch.eye(8).double()))
    values, X = torch.linalg.eig(A[:2])
    before = torch.full((3,), torch.inf).double()
    for k in range(12):
        bound = gelfand_bound(A, k)
        assert (bound <= before * (1 + 1e-12)).all()
        assert (bound >= spectral_radius(A) * (1 - 1e-12)).all()
        before = bound
        excess = torch.linalg.cond(X) * math.sqrt(8)
        rho = values.abs().amax(-1)
        assert (bound[:2] <= rho * excess ** (0.5**k) * (1 + 1e-12)).all()


def test_gelfand_bound_where_power_iteration_fails():
    """A dominant complex pair: quotients of iterates go on oscillating."""
    A = double([[0, -2], [0.5, 0]])
    assert gelfand_bound(A, 20).item() == pytest.approx(1, rel=1e-5)
    assert_printed(spectral_radius(A), 1.0)


def test_gelfand_gradient():
    nilpotent = double([[0, 4], [0, 0]])
    A = torch.stack((detmat(2, 2, 3), nilpotent)).requires_grad_()
    gelfand_bound(A).sum().backward()
    assert A.grad[0].any()
    assert not A.grad[1].any()
    A = detmat(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: gelfand_bound(a, 3), (A,))


def test_gelfand_without_looking_at_the_values():
    A = detmat(3, 3)
    assert torch.equal(gelfand_bound(A, check_values=False), gelfand_bound(A))
    A[0, 0] = torch.nan
    assert gelfand_bound(A, check_values=False).isnan()


def test_radius_of_a_sum_is_not_that_of_the_parts():
    block, u, v = double([[0, 3], [0, 0]]), double([[0], [1]]), double([3, 0])
    low_rank = u @ v[None]
    assert spectral_radius(block) == spectral_radius(low_rank) == 0
    assert_printed(spectral_radius(block + low_rank), 3.0)


@pytest.mark.parametrize('function', FUNCTIONS)
def test_precision_and_autocast(function):
    A = detmat(4, 4)
    exact = function(A)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert function(A.to(dtype)).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        inside = function(A.float())
    assert inside.dtype == torch.float32
    assert abs(inside - exact) <= 1e-6 * abs(exact)


def test_scaled_time():
    """All are homogeneous."""
    A = detmat(5, 5, 1)
    for function in FUNCTIONS:
        torch.testing.assert_close(function(3 * A), 3 * function(A))


@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('size', [1, 2, 4])
@pytest.mark.parametrize('function', FUNCTIONS)
def test_non_finite_input(function, size, bad):
    A = batch_of(3, size)
    A[1, -1, 0] = bad
    with pytest.raises(ValueError, match=r'^A must be finite, got 1 NaN or'):
        function(A)


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('shape', [(3,), (2, 3), (4, 0, 0)])
def test_not_square(function, shape):
    with pytest.raises(ValueError, match=r'A must be \(\.\.\., N, N\)'):
        function(torch.zeros(shape))


def test_bad_arguments():
    with pytest.raises(ValueError, match='k must be >= 0, got -1'):
        gelfand_bound(detmat(2, 2), -1)
