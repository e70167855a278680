"""Eigenbases of dense matrices, and what a scan needs to use them."""

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
    decompose,
    matrix_exponential_scan,
)
from mmstabvim.stability.state import eigenbasis
from mmstabvim.stability.state.eigenbasis import (
    COMPLEX64,
    COMPLEX128,
    EXPONENTIAL,
    known_eig,
)


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
    inverse = basis.inverse @ X
    assert_printed(inverse, torch.eye(size).expand_as(inverse).to(X))
    left = basis.inverse.mH
    left = left / torch.linalg.vector_norm(left, dim=-2, keepdim=True)
    cosine = (left.conj() * X).sum(-2).abs().amin(-1)
    torch.testing.assert_close(basis.cosine, cosine)
    assert (basis.kind() == COMPLEX64).all()


def test_one_call_for_all_matrices(monkeypatch):
    """Sound matrices cost one decomposition, whatever their number."""
    calls = []
    eig = torch.linalg.eig

    def count(A):
        calls.append(tuple(A.shape))
        return eig(A)

    monkeypatch.setattr(torch.linalg, 'eig', count)
    decompose(batch_of(24, 4).reshape(6, 4, 4, 4))
    assert calls == [(6, 4, 4, 4)]


ILL = {
    'jordan 2': double([[0.5, 1], [0, 0.5]]),
    'nearly': double([[-1, 1], [1e-8, -1]]),
    'nilpotent': torch.diag(torch.ones(3), 1).double(),
    'jordan 16': torch.diag(torch.ones(15), 1).double() - torch.eye(16),
    'hippo': hippo(16),
}


@pytest.mark.parametrize('A', ILL.values(), ids=ILL)
def test_ill_conditioned_is_kept_as_it_is(A):
    """Nothing is perturbed: the eigenvalues are those of A."""
    sound = detmat(*A.shape)
    basis = decompose(torch.stack((sound, A, sound)))
    assert basis.kind().tolist()[::2] == [COMPLEX64, COMPLEX64]
    assert basis.kind()[1] > COMPLEX64
    alone = decompose(sound)
    assert torch.equal(basis.eigenvalues[2], alone.eigenvalues)
    assert torch.equal(basis.vectors[2], alone.vectors)
    assert torch.equal(basis.eigenvalues[1], torch.linalg.eig(A)[0])
    assert basis.cosine[1] < 1e-3


def test_condition_of_the_family():
    """kappa is about eta^(-1/2), and decides on the precision."""
    kinds = {
        1e-2: COMPLEX64,
        1e-4: COMPLEX64,
        1e-8: COMPLEX128,
        1e-18: COMPLEX128,
        1e-24: EXPONENTIAL,
        0: EXPONENTIAL,
    }
    for eta, kind in kinds.items():
        basis = decompose(double([[-1, 1], [eta, -1]]))
        assert basis.kind() == kind, eta
        if eta:
            assert basis.condition == pytest.approx(eta**-0.5, rel=0.01)
    A = double([[-1, 1], [1e-8, -1]])
    assert decompose(A).kind(kappa_max=1e5) == COMPLEX64


EQUAL = {
    'zero': torch.zeros(4, 4).double(),
    'scalar': -torch.eye(4).double(),
    'pair': torch.diag(double([-0.1, -0.1, -1, -2])),
    'two blocks': torch.block_diag(*[double([[-1, -2], [2, -1]])] * 2),
}


@pytest.mark.parametrize('A', EQUAL.values(), ids=EQUAL)
def test_equal_eigenvalues_are_separated_for_gradients(A):
    """Downward, by less than float32 rounds; the values do not need it."""
    inputs = coupled_inputs()
    grads = []
    for in_basis in (True, False):
        leaf = A.clone().requires_grad_()
        if in_basis:
            basis = decompose(leaf)
            assert basis.gap < 1e-15
            assert basis.kind() == COMPLEX64
            assert basis.kind(gradient=True) == COMPLEX128
            with torch.no_grad():
                values = basis.separated()
            moved = (values - basis.eigenvalues).detach()
            assert moved.abs().max() <= 1.0001e-8 * basis.norm
            assert (moved.real <= 0).all()
            values, vectors = known_eig(leaf, values, basis.vectors.detach())
            basis = basis._replace(eigenvalues=values, vectors=vectors)
            y = eigenbasis_scan(basis, *inputs)
        else:
            y, _ = scan(leaf, *inputs)
        y.sin().sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() <= 1e-6
    sound = decompose(detmat(4, 4))
    assert torch.equal(sound.separated(), sound.eigenvalues)


@pytest.mark.parametrize('gap', [0.0, 1e-6, 1e-5, 1e-4, 1e-3])
def test_gradient_of_a_float32_scan_near_equal_eigenvalues(gap):
    """The scan's rounding, divided by the gap, must not drown the gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(normal(4, 4).double())[0]
    values = torch.tensor([-0.5, -0.5 - gap, -1.0, -2.0]).double()
    A = (basis @ torch.diag(values) @ basis.T).float()
    kind = decompose(A).kind(gradient=True)
    dtype = torch.complex64 if kind == COMPLEX64 else torch.complex128
    u, delta = normal(2, 30, 1), 0.3 * torch.rand(2, 30, 1)
    B, C, weight = (normal(2, 30, n) for n in (4, 4, 1))
    grads = []
    for in_basis in (True, False):
        leaf = A.clone().requires_grad_()
        if in_basis:
            found = decompose(leaf)
            X = found.vectors.to(dtype)
            h, rows = torch.zeros(2, 4, dtype=dtype), []
            rate = found.eigenvalues.to(dtype)
            drive = torch.linalg.solve(X, B.to(dtype)[..., None])[..., 0]
            for t in range(30):
                h = torch.exp(delta[:, t] * rate) * h
                h = h + delta[:, t] * u[:, t] * drive[:, t]
                rows.append((h * (C[:, t].to(dtype) @ X)).sum(-1).real)
            y = torch.stack(rows, 1)[..., None]
        else:
            wide = (x.double() for x in (u, delta, leaf[None], B, C))
            y, _ = matrix_exponential_scan(*wide)
        (y * weight).sum().backward()
        grads.append(leaf.grad.double())
    error = (grads[0] - grads[1]).abs().max() / grads[1].abs().max()
    assert error <= 0.02


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
