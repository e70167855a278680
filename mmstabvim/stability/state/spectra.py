"""Spectral radius, abscissa and numerical abscissa of small matrices."""

from typing import Any, cast

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
"""Least ``|y^H x|`` of left and right unit eigenvectors with the exact
gradient of an eigenvalue, whose norm is its inverse."""


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


def _with_gradient(A: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, _Eigenvalues).apply(A, values, vectors))


def known_eigenvalues(A: Tensor, basis: Eigenbasis) -> Tensor:
    """Give known eigenvalues of A the gradient of :func:`eigenvalues`.

    Args:
        A (Tensor): (..., N, N), float64, on the CPU, 1/step.
        basis (Eigenbasis): Eigendecomposition of ``A``.

    Returns:
        Tensor: (..., N), complex128, 1/step.
    """
    return _with_gradient(A, basis.eigenvalues, basis.vectors)


def eigenvalues(A: Tensor) -> Tensor:
    """Eigenvalues of A itself, with bounded gradients.

    With left and right eigenvectors y, x the gradient of an eigenvalue is
    ``conj(y) x^T / (y^H x)``, of norm ``1 / |cos(y, x)|``. A matrix whose
    smallest cosine is below :data:`SMALLEST_COSINE` is nearly defective. Each
    of its eigenvalues gets the gradient of the numerical abscissa instead, of
    norm 1. The values are the same with and without gradients.

    Args:
        A (Tensor): (..., N, N), real or complex.

    Returns:
        Tensor: (..., N), complex128, on the CPU, differentiable; near a
        defective matrix differentiable once.

    Raises:
        ValueError: If ``A`` is not square or not finite.

    Source: Horn and Johnson, Matrix Analysis, Sec. 6.3.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
        >>> eigenvalues(A).imag.float()
        tensor([ 2., -2.])
    """
    matrix = dense('A', A)
    # eigvals alone would round differently
    values: Tensor
    values, vectors = torch.linalg.eig(matrix)
    if not values.requires_grad:
        return values
    if (eigenvector_cosine(vectors.detach())[0] >= SMALLEST_COSINE).all():
        return values
    return _with_gradient(matrix, values.detach(), vectors.detach())


def spectral_radius(A: Tensor) -> Tensor:
    """Largest modulus of an eigenvalue, ``max |lambda|``.

    Differentiable: with left and right eigenvectors y, x of the largest
    eigenvalue, ``d rho / d A = Re(conj(lambda) / |lambda| conj(y) x^T /
    (y^H x))``; ties share it. It does not exist where the eigenvectors are
    linearly dependent. A 2 x 2 matrix then gets the gradient of the mean of
    its eigenvalues, a larger one the bounded gradient of :func:`eigenvalues`.

    Args:
        A (Tensor): (..., N, N), real or complex.

    Returns:
        Tensor: (...), >= 0, unit of ``A``; real dtype of ``A``, at least
        float32. Computed in float64.

    Raises:
        ValueError: If ``A`` is not square or not finite.

    Source: Horn and Johnson, Matrix Analysis, Sec. 1.2 and 6.3.

    Example:
        >>> spectral_radius(torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
        tensor(2.)
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

    Differentiable; for dependent eigenvectors see :func:`spectral_radius`.

    Args:
        A (Tensor): (..., N, N), real or complex.

    Returns:
        Tensor: (...), unit of ``A``; real dtype of ``A``, at least float32.
        Computed in float64.

    Raises:
        ValueError: If ``A`` is not square or not finite.

    Source: Trefethen and Embree, Spectra and Pseudospectra, Sec. 14.

    Example:
        >>> spectral_abscissa(torch.tensor([[-1.0, 5.0], [0.0, -3.0]]))
        tensor(-1.)
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

    It is at least the spectral abscissa, and ``||exp(t A)|| <= exp(t mu)``.

    Args:
        A (Tensor): (..., N, N), real or complex.

    Returns:
        Tensor: (...), unit of ``A``; real dtype of ``A``, at least float32.
        Computed in float64, differentiable.

    Raises:
        ValueError: If ``A`` is not square or not finite.

    Source: Trefethen and Embree, Spectra and Pseudospectra, Sec. 17.

    Example:
        >>> numerical_abscissa(torch.tensor([[-1.0, 4.0], [0.0, -1.0]]))
        tensor(1.)
    """
    matrix = dense('A', A)
    symmetric = (matrix + matrix.mH) / 2
    largest: Tensor = torch.linalg.eigvalsh(symmetric)[..., -1]
    return largest.to(A.device, real_dtype(A))


def gelfand_bound(A: Tensor, k: int = 10, check_values: bool = True) -> Tensor:
    """Upper bound ``||A^(2^k)||_F^(1 / 2^k)`` of the spectral radius.

    It holds for every matrix, up to rounding, and does not increase with
    ``k``. It exceeds the radius by a factor of at most ``(kappa sqrt(N))^(1 /
    2^k)`` with the condition number kappa of the eigenvectors. It needs no
    eigenvalues and stays on the device.

    Args:
        A (Tensor): (..., N, N), real or complex.
        k (int): Number of squarings, >= 0. Defaults to 10.
        check_values (bool): Raise for non-finite entries, which on a GPU
            waits for the device; otherwise they give NaN. Defaults to True.

    Returns:
        Tensor: (...), >= 0, unit of ``A``; 0 if a power is 0 (nilpotent).
        Real dtype of ``A``, at least float32. Computed in float64,
        differentiable.

    Raises:
        ValueError: If ``A`` is not square or not finite, or ``k`` negative.

    Source: Gelfand's formula; Horn and Johnson, Matrix Analysis, 5.6.14.

    Example:
        >>> A = torch.tensor([[-1.0, 4.0], [0.0, -1.0]])
        >>> [round(gelfand_bound(A, k).item(), 4) for k in (0, 4, 10)]
        [4.2426, 1.2969, 1.0082]
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
