"""HiPPO-LegS and the diagonal initializations derived from it.

Everything is computed in float64 unless said otherwise.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class NormalForm(NamedTuple):
    """HiPPO-LegS as ``Q (blkdiag [[-1/2, w], [-w, -1/2]] - p p^T) Q^T``."""

    frequencies: Tensor
    """(N / 2,), the w above, descending and positive, rad/step."""
    rotation: Tensor
    """(N, N), Q, real orthogonal."""
    rank_one: Tensor
    """(N,), p; every second entry is 0, the others are positive."""

    @property
    def normal(self) -> Tensor:
        """(N, N), the blocks of frequencies, 1/step."""
        w = self.frequencies
        above = torch.stack([w, torch.zeros_like(w)], -1).flatten()
        upper = torch.diag(above[:-1], 1)
        return upper - upper.mT - torch.eye(len(upper), dtype=w.dtype) / 2

    @property
    def dense(self) -> Tensor:
        """(N, N), HiPPO-LegS in the coordinates of Q, 1/step."""
        return self.normal - torch.outer(self.rank_one, self.rank_one)


def hippo_legs(size: int) -> tuple[Tensor, Tensor]:
    """Matrices A and B of HiPPO-LegS.

    The states are the coefficients of the exponentially faded past in
    Legendre polynomials. The eigenvalues of A are -1, ..., -N, its numerical
    abscissa is -1/2 (N > 1), and its eigenvectors are nearly dependent: see
    :func:`hippo_condition`.

    Args:
        size (int): N, positive.

    Returns:
        tuple[Tensor, Tensor]: A (N, N), 1/step, lower triangular, and B (N,).

    Raises:
        ValueError: If the size is not positive.

    Source: arXiv:2008.07669, Theorem 2; arXiv:2111.00396, Eq. 2.

    Example:
        >>> A, B = hippo_legs(2)
        >>> A.diagonal().tolist(), [round(b, 4) for b in B.tolist()]
        ([-1.0, -2.0], [1.0, 1.7321])
    """
    _check_positive('size', size)
    n = torch.arange(size, dtype=torch.float64)
    B = torch.sqrt(2 * n + 1)
    A = torch.tril(-torch.outer(B, B), -1) - torch.diag(n + 1)
    return A, B


def legs_normal_form(size: int) -> NormalForm:
    """Split HiPPO-LegS into 2 x 2 blocks and a rank-one term.

    ``A + P P^T`` with ``P_n = sqrt(n + 1/2)`` is -1/2 plus a skew-symmetric
    matrix, so a rotation makes it block-diagonal. The free angle of each
    block is fixed such that the result is unique.

    Args:
        size (int): N, positive and even.

    Returns:
        NormalForm: Its ``dense`` is ``Q^T A Q`` up to rounding.

    Raises:
        ValueError: If the size is not positive and even.

    Source: arXiv:2111.00396, Sec. 3.1 and Appendix C.

    Example:
        >>> legs_normal_form(2).frequencies
        tensor([0.8660], dtype=torch.float64)
    """
    if size < 2 or size % 2:
        raise ValueError(f'size must be positive and even, got {size!r}')
    A, B = hippo_legs(size)
    P = B / math.sqrt(2)
    skew = A + torch.outer(P, P) + torch.eye(size, dtype=A.dtype) / 2
    values, vectors = torch.linalg.eigh(-1j * skew)
    # the largest first; the other half are the conjugates
    frequencies = values[size // 2 :].flip(0)
    vectors = vectors[:, size // 2 :].flip(1)
    vectors = vectors * (vectors.mH @ P.to(vectors.dtype)).sgn()
    pairs = torch.stack([vectors.real, vectors.imag], -1)
    rotation = math.sqrt(2) * pairs.flatten(1)
    rank_one = rotation.mT @ P
    rank_one[1::2] = 0  # rounding errors
    return NormalForm(frequencies, rotation, rank_one)


def hippo_condition(size: int) -> float:
    """Condition number of the unit eigenvectors of HiPPO-LegS.

    It grows about 5.8 times with every state. The eigenvectors hold the
    coefficients of shifted Legendre polynomials, and their inverse those of
    monomials. Both are known exactly, so float64 gives both norms to 12
    digits. LAPACK's eigenvectors would give 6e18 instead of 1.2e23 for N =
    32.

    Args:
        size (int): N, from 1 to 200 (larger ones overflow).

    Returns:
        float: At least 1.

    Raises:
        ValueError: If the size is out of range.

    Source: Abramowitz and Stegun, 22.3 and 22.20 for the polynomials.

    Example:
        >>> round(hippo_condition(2), 4), f'{hippo_condition(32):.2e}'
        (3.7321, '1.22e+23')
    """
    _check_positive('size', size)
    if size > 200:
        raise ValueError(f'size must be at most 200, got {size}')
    root = torch.sqrt(2 * torch.arange(size, dtype=torch.float64) + 1)
    vectors = root[:, None] * _fill(size, _legendre_coefficient)
    norms = torch.linalg.vector_norm(vectors, dim=0)
    inverse = norms[:, None] * _fill(size, _monomial_coefficient) / root
    return float(
        torch.linalg.matrix_norm(vectors / norms, 2)
        * torch.linalg.matrix_norm(inverse, 2)
    )


def hippo_response(size: int, omega: Tensor) -> Tensor:
    """Response ``(i omega - A)^-1 B`` of HiPPO-LegS, in closed form.

    Entry n is ``sqrt(2n+1) prod_{k<n} (s-k) / prod_{k<=n+1} (s+k)``, with s =
    i omega, k from 0 in the numerator and from 1 in the denominator. The norm
    of the response is at most 1, and 1 at omega = 0.

    Args:
        size (int): N, positive.
        omega (Tensor): (frequencies,), real, rad/step.

    Returns:
        Tensor: (frequencies, N), complex128, on the device of ``omega``.

    Raises:
        ValueError: If the size is not positive.

    Example:
        >>> hippo_response(2, torch.zeros(1)).real.tolist()
        [[1.0, 0.0]]
    """
    _check_positive('size', size)
    s = 1j * omega.double()[:, None]
    n = torch.arange(size, dtype=torch.float64, device=omega.device)
    ratio = (s - (n - 1)) / (s + n + 1)
    ratio[:, 0] = 1 / (s[:, 0] + 1)
    return torch.sqrt(2 * n + 1) * ratio.cumprod(1)


def state_response(A: Tensor, B: Tensor, omega: Tensor) -> Tensor:
    """Response ``(i omega - A)^-1 B`` of the states to a Fourier mode.

    Args:
        A (Tensor): (N, N), real or complex, 1/step, no eigenvalue at
            i omega.
        B (Tensor): (N,), real or complex.
        omega (Tensor): (frequencies,), real, rad/step.

    Returns:
        Tensor: (frequencies, N), complex128, on the device of ``A``.

    Example:
        >>> A, B = torch.tensor([[-2.0]]), torch.ones(1)
        >>> state_response(A, B, torch.tensor([0.0, 2.0])).abs().float()
        tensor([[0.5000],
                [0.3536]])
    """
    A, B = A.to(torch.complex128), B.to(torch.complex128)
    s = 1j * omega.to(A.device, torch.float64)
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    response: Tensor = torch.linalg.solve(s[:, None, None] * eye - A, B)
    return response


def s4d_real(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """S4D-Real: -1, ..., -N, the eigenvalues of HiPPO-LegS.

    Args:
        size (int): N.
        dtype (torch.dtype): Real dtype. Defaults to float64.

    Returns:
        Tensor: (N,), 1/step.

    Source: arXiv:2206.11893, Sec. 4.

    Example:
        >>> s4d_real(3).tolist()
        [-1.0, -2.0, -3.0]
    """
    return -torch.arange(1, size + 1, dtype=dtype)


def s4d_lin(pairs: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """S4D-Lin: ``-1/2 + i pi n``.

    Args:
        pairs (int): Number of conjugate pairs; one of each is returned.
        dtype (torch.dtype): Real dtype of the parts. Defaults to float64.

    Returns:
        Tensor: (pairs,), complex, 1/step.

    Source: arXiv:2206.11893, Eq. 9.

    Example:
        >>> s4d_lin(2, torch.float32)
        tensor([-0.5000+0.0000j, -0.5000+3.1416j])
    """
    n = torch.arange(pairs, dtype=dtype)
    return _pairs(math.pi * n)


def s4d_inv(pairs: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """S4D-Inv: ``-1/2 + i (N / pi) (N / (2n+1) - 1)`` with N = 2 pairs.

    Args:
        pairs (int): Number of conjugate pairs; one of each is returned.
        dtype (torch.dtype): Real dtype of the parts. Defaults to float64.

    Returns:
        Tensor: (pairs,), complex, 1/step, descending imaginary parts.

    Source: arXiv:2206.11893, Eq. 8.

    Example:
        >>> s4d_inv(2, torch.float32)
        tensor([-0.5000+3.8197j, -0.5000+0.4244j])
    """
    n, size = torch.arange(pairs, dtype=dtype), 2 * pairs
    return _pairs(size / math.pi * (size / (2 * n + 1) - 1))


def s4d_legs(pairs: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """S4D-LegS: the eigenvalues of the normal part of HiPPO-LegS.

    Args:
        pairs (int): Number of conjugate pairs; one of each is returned.
        dtype (torch.dtype): Real dtype of the parts. Defaults to float64.

    Returns:
        Tensor: (pairs,), complex, 1/step, descending imaginary parts.

    Source: arXiv:2206.11893, Eq. 7; arXiv:2203.14343.

    Example:
        >>> s4d_legs(1, torch.float32)
        tensor([-0.5000+0.8660j])
    """
    return _pairs(legs_normal_form(2 * pairs).frequencies.to(dtype))


def s4d_legs_input(pairs: int) -> Tensor:
    """Half of HiPPO's B in the eigenbasis of :func:`s4d_legs`.

    Args:
        pairs (int): Number of conjugate pairs; one of each is returned.

    Returns:
        Tensor: (pairs,), real (by the choice of the eigenvectors' phases),
        positive, float64.

    Source: arXiv:2206.11893, Theorem 3 (why half).

    Example:
        >>> round(s4d_legs_input(1).item(), 4)
        0.7071
    """
    # B = sqrt(2) P, and a unit vector is half of two rotated axes each
    return legs_normal_form(2 * pairs).rank_one[::2] / 2


S4D_PAIRS: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    's4d_lin': s4d_lin,
    's4d_inv': s4d_inv,
    's4d_legs': s4d_legs,
}
"""Initializations by conjugate pairs."""


def _pairs(imaginary: Tensor) -> Tensor:
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f'{name} must be positive, got {value!r}')


def _fill(size: int, entry: Callable[[int, int], Fraction]) -> Tensor:
    """Lower triangular (size, size), each entry rounded once."""
    rows = [
        [float(entry(n, k)) if k <= n else 0.0 for k in range(size)]
        for n in range(size)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _legendre_coefficient(n: int, k: int) -> Fraction:
    """Coefficient of x^k in the Legendre polynomial ``P_n(2x - 1)``."""
    return Fraction((-1) ** (n + k) * math.comb(n, k) * math.comb(n + k, k))


def _monomial_coefficient(k: int, n: int) -> Fraction:
    """Coefficient of ``P_n(2x - 1)`` in x^k."""
    above = (2 * n + 1) * math.factorial(k) ** 2
    return Fraction(above, math.factorial(k - n) * math.factorial(k + n + 1))
