"""Eigenbases of dense matrices, exact and perturbed."""

import math

import pytest
import torch
from stability_oracles import (
    assert_printed,
    batch_of,
    coupled_inputs,
    detmat,
    double,
    eigenbasis_scan,
    hippo,
    scan,
)

from mmstabvim.stability import (
    Eigenbasis,
    clamp_matrix,
    decompose,
    eigenbasis,
    matrix_exponential_scan,
    numerical_abscissa,
)
from mmstabvim.stability.eigenbasis import EXACT, FAILED, PERTURBED


@pytest.mark.parametrize('size', [1, 2, 3, 8])
def test_decompose(size):
    """A batch of any shape: A X = X diag(lambda), unit columns."""
    A = batch_of(12, size).reshape(3, 4, size, size)
    basis = decompose(A)
    assert isinstance(basis, Eigenbasis)
    assert basis.eigenvalues.shape == (3, 4, size)
    assert basis.vectors.shape == A.shape
    assert basis.vectors.dtype == torch.complex128
    X = basis.vectors
    assert_printed(
        torch.linalg.vector_norm(X, dim=-2), torch.ones(3, 4, size).double()
    )
    product = A.to(X.dtype) @ X
    torch.testing.assert_close(product, X * basis.eigenvalues[..., None, :])
    torch.testing.assert_close(basis.condition, torch.linalg.cond(X))
    assert (basis.kind == EXACT).all()
    assert not basis.perturbation.any()
    assert basis.ok.all()


def test_one_call_for_all_matrices(monkeypatch):
    """Sound matrices cost one decomposition, whatever their number."""
    calls = []
    eig = torch.linalg.eig

    def count(A):
        calls.append(tuple(A.shape))
        return eig(A)

    monkeypatch.setattr(torch.linalg, 'eig', count)
    decompose(batch_of(24, 4).reshape(6, 4, 4, 4))
    assert calls == [(24, 4, 4)]


ILL = {
    'jordan 2': double([[0.5, 1], [0, 0.5]]),
    'nearly': double([[-1, 1], [1e-8, -1]]),
    'nilpotent': torch.diag(torch.ones(3), 1).double(),
    'jordan 16': torch.diag(torch.ones(15), 1).double() - torch.eye(16),
    'hippo': hippo(16),
}


@pytest.mark.parametrize('A', ILL.values(), ids=ILL)
def test_ill_conditioned_is_perturbed(A):
    """Within kappa_max, with the bound of the exponential's error."""
    sound = detmat(*A.shape)
    basis = decompose(torch.stack((sound, A, sound)))
    assert basis.kind.tolist() == [EXACT, PERTURBED, EXACT]
    assert basis.condition[1] <= 1e3
    assert torch.linalg.cond(torch.linalg.eig(A)[1]) > 1e3
    alone = decompose(sound)
    assert torch.equal(basis.eigenvalues[2], alone.eigenvalues)
    assert torch.equal(basis.vectors[2], alone.vectors)
    X, values = basis.vectors[1], basis.eigenvalues[1]
    back = torch.linalg.solve(X, X * values, left=False)
    assert back.imag.abs().max() <= 1e-10
    error = torch.linalg.matrix_norm(back.real - A, 2)
    norm = torch.linalg.matrix_norm(A, 2)
    relative = basis.perturbation[1]
    assert relative in (1e-3, 1e-2, 1e-1)
    torch.testing.assert_close(error / norm, relative)
    growth = torch.exp(0.3 * (numerical_abscissa(A) + error))
    moved = torch.linalg.matrix_exp(0.3 * back.real)
    moved = moved - torch.linalg.matrix_exp(0.3 * A)
    assert torch.linalg.matrix_norm(moved, 2) <= 0.3 * error * growth
    again = decompose(A)
    assert torch.equal(again.eigenvalues, values)


def test_condition_of_the_family():
    """kappa is about eta^(-1/2); beyond 1e3 nothing exact is returned."""
    for eta, kind in ((1e-2, EXACT), (1e-4, EXACT), (1e-8, PERTURBED)):
        A = double([[-1, 1], [eta, -1]])
        basis = decompose(A)
        assert basis.kind == kind
        if kind == EXACT:
            assert basis.condition == pytest.approx(eta**-0.5, rel=0.01)
    assert decompose(A, kappa_max=1e5).kind == EXACT


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('sign', [-1, 1])
def test_bad_condition_is_cured_by_at_least_1e_3(sign, transposed):
    """Also where a smaller perturbation would just do."""
    A = double([[-1, sign], [sign * 9.9e-7, -1]])
    basis = decompose(A.T if transposed else A)
    assert basis.perturbation in (1e-3, 1e-2, 1e-1)


def test_what_does_not_separate_does_not_help(monkeypatch):
    monkeypatch.setattr(
        eigenbasis,
        'perturbation',
        lambda size, like: torch.eye(size, dtype=like.dtype),
    )
    assert decompose(-torch.eye(3)).kind == FAILED


def test_larger_perturbations_condition_better():
    """As far as needed, and no further."""
    A = ILL['jordan 2']
    found = [decompose(A, kappa_max=k) for k in (1e3, 20, 8)]
    sizes = [basis.perturbation.item() for basis in found]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1e-3
    assert sizes[-1] > 1e-3
    conditions = [basis.condition.item() for basis in found]
    assert conditions == sorted(conditions, reverse=True)


def test_what_nothing_helps_is_marked():
    sound = -torch.diag(torch.arange(1, 5)).double()
    A = torch.stack((sound, ILL['nilpotent'])).requires_grad_()
    basis = decompose(A, kappa_max=1.5)
    assert basis.kind.tolist() == [EXACT, FAILED]
    assert basis.ok.tolist() == [True, False]
    assert basis.condition[1] > 1e3
    assert basis.eigenvalues[1].abs().max() <= 1e-3
    total = basis.eigenvalues.real.sum() + basis.vectors.real.sum()
    total.backward()
    assert A.grad[0].any()
    assert not A.grad[1].any()


EPS = torch.finfo(torch.float64).eps
EQUAL = {
    'zero': torch.zeros(4, 4).double(),
    'scalar': -torch.eye(4).double(),
    'pair': torch.diag(double([-0.1, -0.1, -1, -2])),
    'two blocks': torch.block_diag(*[double([[-1, -2], [2, -1]])] * 2),
    'clamped': clamp_matrix(torch.diag(double([1, 2, -1, -2]))),
}


@pytest.mark.parametrize('A', EQUAL.values(), ids=EQUAL)
def test_equal_eigenvalues_have_finite_gradients(A):
    """Where the basis is good but not unique, a small perturbation."""
    inputs = coupled_inputs()
    grads = []
    for in_basis in (True, False):
        leaf = A.clone().requires_grad_()
        if in_basis:
            basis = decompose(leaf)
            assert basis.kind == PERTURBED
            assert basis.perturbation == math.sqrt(EPS)
            # shifted back: no less stable than it was
            highest = torch.linalg.eigvals(A).real.max()
            assert basis.eigenvalues.real.max() <= highest + 1e-15
            y = eigenbasis_scan(basis, *inputs)
        else:
            y, _ = scan(leaf, *inputs)
        y.sin().sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() <= 1e-5
    assert (y - eigenbasis_scan(basis, *inputs)).abs().max() <= 1e-6


@pytest.mark.parametrize('gap', [0.0, 1e-6, 1e-5, 1e-4, 1e-3])
def test_gradient_of_a_float32_scan_near_equal_eigenvalues(gap):
    """The scan's rounding, divided by the gap, must not drown the gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(normal(4, 4).double())[0]
    values = torch.tensor([-0.5, -0.5 - gap, -1.0, -2.0]).double()
    A = (basis @ torch.diag(values) @ basis.T).float()
    u, delta = normal(2, 30, 1), 0.3 * torch.rand(2, 30, 1)
    B, C, weight = (normal(2, 30, n) for n in (4, 4, 1))
    grads = []
    for in_basis in (True, False):
        leaf = A.clone().requires_grad_()
        if in_basis:
            found = decompose(leaf, precision=torch.float32)
            X = found.vectors.to(torch.complex64)
            h, rows = torch.zeros(2, 4, dtype=torch.complex64), []
            rate = found.eigenvalues.to(torch.complex64)
            drive = torch.linalg.solve(X, (B + 0j)[..., None])[..., 0]
            for t in range(30):
                h = torch.exp(delta[:, t] * rate) * h
                h = h + delta[:, t] * u[:, t] * drive[:, t]
                rows.append((h * ((C[:, t] + 0j) @ X)).sum(-1).real)
            y = torch.stack(rows, 1)[..., None]
        else:
            wide = (x.double() for x in (u, delta, leaf[None], B, C))
            y, _ = matrix_exponential_scan(*wide)
        (y * weight).sum().backward()
        grads.append(leaf.grad.double())
    error = (grads[0] - grads[1]).abs().max() / grads[1].abs().max()
    assert error <= 0.02


@pytest.mark.parametrize('A', [*ILL.values(), hippo(4)], ids=str)
def test_gradients_are_finite_and_near(A):
    """Within the guard the gradient is that of the exponential of A + E."""
    size = A.shape[-1]
    leaf = torch.stack((A, detmat(size, size, 9))).requires_grad_()
    basis = decompose(leaf)
    X, values = basis.vectors, torch.exp(0.2 * basis.eigenvalues)
    power = torch.linalg.solve(X, X * values[..., None, :], left=False).real
    weight = detmat(size, size, 5)
    (power * weight).sum().backward()
    moved = torch.linalg.solve(
        X, X * basis.eigenvalues[..., None, :], left=False
    )
    moved = moved.real.detach().requires_grad_()
    (torch.linalg.matrix_exp(0.2 * moved) * weight).sum().backward()
    error = (leaf.grad - moved.grad).abs().max()
    assert error <= 1e-6 * moved.grad.abs().max()


def test_gradcheck_of_the_scan_in_the_basis():
    A = detmat(3, 3, 2).requires_grad_()
    delta, u, B, C = coupled_inputs()

    def run(A):
        return eigenbasis_scan(decompose(A), delta, u, B[:, :3], C[:, :3])

    assert torch.autograd.gradcheck(run, (A,))


def test_condition_has_no_gradient():
    basis = decompose(detmat(3, 3).requires_grad_())
    assert basis.eigenvalues.requires_grad
    assert basis.vectors.requires_grad
    assert not basis.condition.requires_grad


def test_float32_input_is_decomposed_in_double():
    A = detmat(4, 4).float()
    basis = decompose(A)
    with torch.autocast('cpu', torch.bfloat16):
        inside = decompose(A)
    wanted = decompose(A.double())
    assert torch.equal(basis.eigenvalues, wanted.eigenvalues)
    assert torch.equal(inside.vectors, wanted.vectors)


def test_singular_vectors_have_an_infinite_condition():
    vectors = torch.ones(2, 3, 3, dtype=torch.complex128)
    vectors[1] = torch.eye(3)
    found = eigenbasis.condition_number(vectors)
    assert found[0] > 1e15
    assert found[1] == 1


def test_gap():
    values = torch.tensor([[1 + 1j, 1 - 1j, 3], [2, 2, 5]])
    assert eigenbasis.eigenvalue_gap(values).tolist() == [2, 0]
    assert eigenbasis.eigenvalue_gap(values[:, :1]).isinf().all()


def test_bad_matrices():
    A = detmat(3, 3)
    with pytest.raises(ValueError, match=r'^A must be finite'):
        decompose(A / 0)
    with pytest.raises(ValueError, match='A must be real'):
        decompose(A + 0j)
    with pytest.raises(ValueError, match=r'A must be \(\.\.\., N, N\)'):
        decompose(A[:2])
    for kappa_max in (0.5, torch.nan):
        with pytest.raises(ValueError, match='kappa_max must be >= 1'):
            decompose(A, kappa_max)
