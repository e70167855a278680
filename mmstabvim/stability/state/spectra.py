"""Spectral radius, abscissa and numerical abscissa of small matrices."""

from typing import Any

import torch
from torch import Tensor

from mmstabvim.stability.inputs import (
    check_finite,
    check_square,
    dense,
    real_dtype,
)
from mmstabvim.stability.state.eigenbasis import Eigenbasis, eigenvector_cosine

SMALLEST_COSINE = 1e-4
"""Least ``|y^H x|`` of left and right unit eigenvectors for which the exact
gradient of an eigenvalue is used: its norm is one over it."""


class _Eigenvalues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, A: Tensor, values: Tensor, vectors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(A, vectors)
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor, None, None]:
        A, vectors = ctx.saved_tensors
        cosine, inverse = eigenvector_cosine(vectors)
        exact = inverse.mH @ (dvalues[..., None] * vectors.mH)
        largest = torch.linalg.eigh((A + A.mH) / 2)[1][..., -1:].to(vectors)
        bounded = dvalues.sum(-1)[..., None, None] * (largest @ largest.mH)
        good = (cosine >= SMALLEST_COSINE)[..., None, None]
        grad = torch.where(good, exact, bounded)
        return grad if A.is_complex() else grad.real, None, None


def known_eigenvalues(A: Tensor, basis: Eigenbasis) -> Tensor:
    """Give known eigenvalues of A the gradient of :func:`eigenvalues`.

    Args:
        A (Tensor): (..., N, N), float64, on the CPU, 1/step.
        basis (Eigenbasis): Of ``A``.

    Returns:
        Tensor: (..., N), complex128, 1/step.
    """
    return _Eigenvalues.apply(A, basis.eigenvalues, basis.vectors)


def eigenvalues(A: Tensor) -> Tensor:
    """Eigenvalues of A itself, with gradients that stay bounded.

    With left and right eigenvectors y, x the gradient of an eigenvalue is
    ``conj(y) x^T / (y^H x)``, of norm ``1 / |cos(y, x)|``. Where the smallest
    of these cosines of a matrix is below :data:`SMALLEST_COSINE`, nearly
    defective, each of its eigenvalues is given the gradient of the numerical
    abscissa instead, of norm 1. The values are the same with and without
    gradients.

    Args:
        A (Tensor): (..., N, N), real or complex.

    Returns:
        Tensor: (..., N), complex128, on the CPU; differentiable, near a
        defective matrix once.

    Raises:
        ValueError: If ``A`` is not square or not finite.

    Source: Horn and Johnson, Matrix Analysis, Sec. 6.3.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
        >>> eigenvalues(A).imag.float().tolist()
        [2.0, -2.0]
    """
    matrix = dense('A', A)
    # eigvals alone would round differently: one value whoever asks
    values, vectors = torch.linalg.eig(matrix)
    if not values.requires_grad:
        return values
    if (eigenvector_cosine(vectors.detach())[0] >= SMALLEST_COSINE).all():
        return values
    return _Eigenvalues.apply(matrix, values.detach(), vectors.detach())


def spectral_radius(A: Tensor) -> Tensor:
    """Largest modulus of an eigenvalue, ``max |lambda|``.

    Differentiable: with left and right eigenvectors y, x of the largest
    eigenvalue, ``d rho / d A = Re(conj(lambda) / |lambda| conj(y) x^T /
    (y^H x))``; ties share it. Where the eigenvectors are linearly dependent
    there is no gradient: a 2 x 2 matrix then gets that of the mean of its
    eigenvalues, a larger one the bounded gradient of :func:`eigenvalues`.

    Args:
        A (Tensor): (..., N, N), real or complex.

    Returns:
        Tensor: (...), >= 0, unit of ``A``; real dtype of ``A``, at least
        float32. Computed in float64.

    Raises:
        ValueError: If ``A`` is not square or not finite.

    Source: Horn and Johnson, Matrix Analysis, Sec. 1.2 and 6.3.
    """
    matrix = dense('A', A)
    if A.shape[-1] == 1:
        radius = matrix[..., 0, 0].abs()
    elif A.shape[-1] == 2 and not A.is_complex():
        radius = _closed_form(matrix)[0]
    else:
        radius = eigenvalues(matrix).abs().amax(-1)
    return radius.to(A.device, real_dtype(A))


def spectral_abscissa(A: Tensor) -> Tensor:
    """Largest real part of an eigenvalue; its sign decides stability.

    Differentiable, with the remarks of :func:`spectral_radius`.

    Args:
        A (Tensor): (..., N, N), real or complex.

    Returns:
        Tensor: (...), unit of ``A``; real dtype of ``A``, at least float32.
        Computed in float64.

    Raises:
        ValueError: If ``A`` is not square or not finite.

    Source: Trefethen and Embree, Spectra and Pseudospectra, Sec. 14.
    """
    matrix = dense('A', A)
    if A.shape[-1] == 1:
        abscissa = _real(matrix[..., 0, 0])
    elif A.shape[-1] == 2 and not A.is_complex():
        abscissa = _closed_form(matrix)[1]
    else:
        abscissa = eigenvalues(matrix).real.amax(-1)
    return abscissa.to(A.device, real_dtype(A))


def numerical_abscissa(A: Tensor) -> Tensor:
    """Largest eigenvalue of ``(A + A^H) / 2``, the logarithmic norm.

    At least the spectral abscissa, and ``||exp(t A)|| <= exp(t mu)``.

    Args:
        A (Tensor): (..., N, N), real or complex.

    Returns:
        Tensor: (...), unit of ``A``; real dtype of ``A``, at least float32.
        Computed in float64, differentiable.

    Raises:
        ValueError: If ``A`` is not square or not finite.

    Source: Trefethen and Embree, Spectra and Pseudospectra, Sec. 17.
    """
    matrix = dense('A', A)
    symmetric = (matrix + matrix.mH) / 2
    largest = torch.linalg.eigvalsh(symmetric)[..., -1]
    return largest.to(A.device, real_dtype(A))


def gelfand_bound(A: Tensor, k: int = 10, check_values: bool = True) -> Tensor:
    """Upper bound ``||A^(2^k)||_F^(1 / 2^k)`` of the spectral radius.

    Holds for every matrix, up to rounding, and does not increase with ``k``;
    too large by a factor of at most ``(kappa sqrt(N))^(1 / 2^k)`` with the
    condition number kappa of the eigenvectors. Needs no eigenvalues and stays
    on the device.

    Args:
        A (Tensor): (..., N, N), real or complex.
        k (int): Number of squarings, >= 0. Defaults to 10.
        check_values (bool): Look for non-finite entries, which on a GPU waits
            for the device; otherwise they give NaN. Defaults to True.

    Returns:
        Tensor: (...), >= 0, unit of ``A``; 0 if a power is 0 (nilpotent).
        Real dtype of ``A``, at least float32. Computed in float64,
        differentiable.

    Raises:
        ValueError: If ``A`` is not square or not finite, or ``k`` negative.

    Source: Gelfand's formula; Horn and Johnson, Matrix Analysis, 5.6.14.
    """
    check_square('A', A)
    if k < 0:
        raise ValueError(f'k must be >= 0, got {k}')
    if check_values:
        check_finite('A', A)
    power = A.to(torch.complex128 if A.is_complex() else torch.float64)
    log_bound = power.new_zeros(A.shape[:-2], dtype=torch.float64)
    vanished = torch.zeros_like(log_bound, dtype=torch.bool)
    for j in range(k + 1):
        norm = torch.linalg.matrix_norm(power)
        vanished = vanished | (norm == 0)
        # a power that vanished must not put a NaN into the gradient
        norm = torch.where(norm == 0, 1.0, norm)
        log_bound = log_bound + norm.log() / 2**j
        power = power / norm[..., None, None]
        power = power @ power
    bound = torch.where(vanished, 0.0, log_bound.exp())
    return bound.to(real_dtype(A))


def block_low_rank_radius_bound(
    blocks: Tensor, U: Tensor, V: Tensor
) -> Tensor:
    """Bound the spectral radius of ``blkdiag(blocks) + U V^T`` cheaply.

    The spectral norms of both parts, ``max_k ||A_k|| + ||U V^T||`` with
    ``||U V^T||^2 = lambda_max(U^T U V^T V)``, so no N x N matrix is formed.

    Args:
        blocks (Tensor): (..., K, b, b), real.
        U (Tensor): (..., K * b, r); r may be 0.
        V (Tensor): (..., K * b, r).

    Returns:
        Tensor: (...), >= 0, unit of ``blocks``, an upper bound up to
        rounding. At least float32, computed in float64, differentiable.

    Raises:
        ValueError: If the shapes do not fit or a value is not finite.
    """
    wide = dense('blocks', blocks)
    size = blocks.shape[-3] * blocks.shape[-1] if blocks.dim() > 2 else -1
    if U.shape != V.shape or U.dim() < 2 or U.shape[-2] != size:
        raise ValueError(
            'want blocks (..., K, b, b) and U, V (..., K * b, r), got '
            f'{tuple(blocks.shape)}, {tuple(U.shape)}, {tuple(V.shape)}'
        )
    check_finite('U', U)
    check_finite('V', V)
    bound = torch.linalg.matrix_norm(wide, 2).amax(-1)
    if U.shape[-1] > 0:
        U, V = U.to('cpu', torch.float64), V.to('cpu', torch.float64)
        bound = bound + _safe_sqrt(spectral_radius((U.mT @ U) @ (V.mT @ V)))
    return bound.to(blocks.device, real_dtype(blocks, U, V))


def _real(values: Tensor) -> Tensor:
    return values.real if values.is_complex() else values


def _safe_sqrt(x: Tensor) -> Tensor:
    """``sqrt(max(x, 0))``, with gradient 0 where x <= 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _closed_form(A: Tensor) -> tuple[Tensor, Tensor]:
    """Spectral radius and abscissa of real (..., 2, 2) matrices."""
    # a power of two, so that scaling rounds nothing, against overflow
    exponent = torch.frexp(A.detach().abs().amax((-2, -1))).exponent
    scale = torch.ldexp(torch.ones_like(A[..., 0, 0]), exponent - 1)
    (a, b), (c, d) = (
        row.unbind(-1) for row in (A / scale[..., None, None]).unbind(-2)
    )
    half_trace = (a + d) / 2
    # trace^2 - 4 det, without the cancellation of that form
    discriminant = (a - d) ** 2 + 4 * b * c
    spread = _safe_sqrt(discriminant) / 2
    squared = half_trace**2 + torch.relu(-discriminant) / 4
    radius = torch.where(
        discriminant < 0, _safe_sqrt(squared), half_trace.abs() + spread
    )
    return radius * scale, (half_trace + spread) * scale
