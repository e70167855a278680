"""HiPPO-LegS and S4D: closed forms, printed digits, bad sizes."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from stability_oracles import assert_printed, double

from mmstabvim.stability import (
    S4D_PAIRS,
    hippo_condition,
    hippo_legs,
    hippo_response,
    legs_normal_form,
    numerical_abscissa,
    s4d_inv,
    s4d_legs,
    s4d_legs_input,
    s4d_lin,
    s4d_real,
    state_response,
)

NORMS = {
    4: 10.279989,
    8: 40.809929,
    16: 163.033634,
    32: 651.955774,
    64: 2607.651252,
}
CONDITIONS = {
    1: 1.0,
    2: 2 + math.sqrt(3),
    4: 86.112394,
    8: 7.7032418e4,
    16: 8.3198591e10,
    32: 1.2199558e23,
    64: 3.2003977e47,
}
OMEGA = double([0.0, 1e-3, 0.5, 3.0, 80.0, 1e4])


@pytest.mark.parametrize('size', NORMS)
def test_size_and_numerical_abscissa(size):
    A, B = hippo_legs(size)
    norm = torch.linalg.matrix_norm(A, 2).item()
    assert norm == pytest.approx(NORMS[size], abs=6e-7)
    assert torch.linalg.vector_norm(B).item() == pytest.approx(size)
    assert numerical_abscissa(A).item() == pytest.approx(-0.5, abs=1e-11)


def test_entries():
    A, B = hippo_legs(3)
    r = math.sqrt
    wanted = [[-1, 0, 0], [-r(3), -2, 0], [-r(5), -r(15), -3]]
    assert_printed(A, double(wanted))
    assert_printed(B, double([1, r(3), r(5)]))


def test_eigenvalues_are_s4d_real():
    """Triangular, so the diagonal tells."""
    A, _ = hippo_legs(64)
    assert not A.triu(1).any()
    assert torch.equal(A.diagonal(), s4d_real(64))


@pytest.mark.parametrize('time', [0.0, 0.03, 0.4, 2.5])
def test_kernel_is_a_legendre_polynomial(time):
    """exp(tA) B = sqrt(2n+1) e^-t P_n(2 e^-t - 1)."""
    A, B = hippo_legs(16)
    n = np.arange(16)
    fading = math.exp(-time)
    polynomial = scipy.special.eval_legendre(n, 2 * fading - 1)
    wanted = torch.from_numpy(np.sqrt(2 * n + 1) * fading * polynomial)
    found = torch.linalg.matrix_exp(time * A) @ B
    assert torch.allclose(found, wanted, atol=1e-9)


def test_decays_at_least_by_the_numerical_abscissa():
    A, _ = hippo_legs(16)
    for time in (0.01, 0.1, 1.0, 5.0):
        norm = torch.linalg.matrix_norm(torch.linalg.matrix_exp(time * A), 2)
        assert norm <= math.exp(-time / 2) * (1 + 1e-12)


# ------------------------------------------------------- transfer function


@pytest.mark.parametrize('size', [1, 2, 7, 16, 64])
def test_response_in_closed_form(size):
    A, B = hippo_legs(size)
    found = hippo_response(size, OMEGA)
    assert found.shape == (6, size)
    assert torch.allclose(found, state_response(A, B, OMEGA), atol=1e-12)


def test_response_is_at_most_one():
    omega = torch.cat([double([0.0]), torch.logspace(-3, 5, 300).double()])
    norms = torch.linalg.vector_norm(hippo_response(16, omega), dim=1)
    assert norms.max() <= 1 + 1e-12
    assert norms[0].item() == pytest.approx(1, abs=1e-14)
    at_three = torch.linalg.vector_norm(hippo_response(16, double([3.0])))
    assert_printed(at_three, 0.9828721869)


def test_response_of_one_complex_mode():
    """1 / (i omega - lambda), by hand."""
    found = state_response(
        torch.tensor([[-0.5 + 2j]]), torch.tensor([3.0]), double([2.0, 1.0])
    )
    wanted = torch.tensor([[6.0], [3 / (0.5 - 1j)]], dtype=torch.complex128)
    assert torch.allclose(found, wanted)


# ------------------------------------------------------------- eigenbasis


@pytest.mark.parametrize('size', CONDITIONS)
def test_condition_number(size):
    """Printed with eight digits."""
    found = hippo_condition(size)
    assert found == pytest.approx(CONDITIONS[size], rel=6e-8)


@pytest.mark.parametrize('size', [2, 8, 12])
def test_condition_number_where_lapack_can_still_tell(size):
    _, vectors = torch.linalg.eig(hippo_legs(size)[0])
    found = torch.linalg.cond(vectors).item()
    assert hippo_condition(size) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize('size', [2, 4, 16, 64])
def test_normal_form(size):
    """Two-by-two blocks and a rank-one term, after a rotation."""
    form, (A, _) = legs_normal_form(size), hippo_legs(size)
    Q = form.rotation
    eye = torch.eye(size, dtype=A.dtype)
    assert (Q @ Q.mT - eye).abs().max() <= 1e-12
    assert (Q @ form.dense @ Q.mT - A).abs().max() <= 1e-11
    blocks = form.normal
    pair = torch.block_diag(*[torch.ones(2, 2)] * (size // 2)).bool()
    assert not blocks[~pair].any()
    assert torch.equal(blocks.diagonal(), torch.full_like(A[0], -0.5))
    assert form.frequencies.min() > 0
    assert (form.frequencies.diff() < 0).all()


def test_normal_form_is_unique():
    """The angles within the blocks do not depend on LAPACK's phases."""
    p = legs_normal_form(16).rank_one
    assert (p[::2] > 0).all()
    assert not p[1::2].any()


# -------------------------------------------------------------------- S4D


def test_printed_imaginary_parts():
    inv = (17.8253536263, 4.2441318158, 1.5278874537, 0.3637827271)
    legs = (19.8574103710, 5.3542085150, 1.9577941509, 0.4274887123)
    assert_printed(s4d_inv(4).imag, double(inv))
    assert_printed(s4d_legs(4).imag, double(legs))
    assert_printed(s4d_lin(3).imag, double([0, math.pi, 2 * math.pi]))


@pytest.mark.parametrize('name', S4D_PAIRS)
def test_real_parts_and_precision(name):
    for dtype in (torch.float64, torch.float32):
        values = S4D_PAIRS[name](8, dtype)
        assert values.dtype == dtype.to_complex()
        assert torch.equal(values.real, torch.full((8,), -0.5, dtype=dtype))


def test_legs_are_the_eigenvalues_of_the_normal_part():
    A, B = hippo_legs(16)
    normal = A + torch.outer(B, B) / 2
    found = torch.linalg.eigvals(normal)
    upper = found[found.imag > 0]
    upper = upper[upper.imag.argsort(descending=True)]
    assert torch.allclose(upper, s4d_legs(8), atol=1e-10)


@pytest.mark.parametrize(
    ('size', 'omega', 'legs', 'hippo'),
    [
        (8, 19.857410, 5.15681, 0.37369),
        (16, 80.966081, 10.21843, 0.19386),
        (64, 1303.273843, 40.75184, 0.04905),
    ],
)
def test_spike(size, omega, legs, hippo):
    """S4D-LegS responds far more strongly to one Fourier mode than HiPPO."""
    A, B = hippo_legs(size)
    spike = legs_normal_form(size).frequencies[:1]
    assert spike.item() == pytest.approx(omega, abs=6e-7)
    normal = A + torch.outer(B, B) / 2
    response = state_response(normal, B / 2, spike)
    assert response.norm().item() == pytest.approx(legs, abs=6e-6)
    # the same through the eigenvalues alone: a unitary basis; two of a pair
    values, b = s4d_legs(size // 2), s4d_legs_input(size // 2)
    both = torch.cat([values, values.conj()])
    diagonal = torch.cat([b, b]) / (1j * spike - both)
    assert diagonal.norm().item() == pytest.approx(legs, abs=6e-6)
    found = hippo_response(size, spike).norm().item()
    assert found == pytest.approx(hippo, abs=6e-6)


# --------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('function', 'arguments', 'message'),
    [
        (hippo_legs, (0,), 'size must be positive, got 0'),
        (hippo_condition, (0,), 'size must be positive, got 0'),
        (hippo_condition, (201,), 'size must be at most 200, got 201'),
        (hippo_response, (-1, OMEGA), 'size must be positive, got -1'),
        (legs_normal_form, (7,), 'size must be positive and even, got 7'),
        (legs_normal_form, (0,), 'size must be positive and even, got 0'),
    ],
    ids=lambda x: getattr(x, '__name__', None),
)
def test_bad_sizes(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
