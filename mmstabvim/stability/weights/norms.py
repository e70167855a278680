"""Spectral norms of matrices and convolutions: exact, bounds, estimates."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmstabvim.stability.inputs import check_finite, real_dtype


class SingularTriple(NamedTuple):
    """Estimates of the largest singular value and its vectors."""

    u: Tensor
    sigma: Tensor
    v: Tensor


def spectral_norm(W: Tensor) -> Tensor:
    """Largest singular value, exact.

    Args:
        W (Tensor): (..., m, n), real or complex.

    Returns:
        Tensor: (...), >= 0, unit of ``W``; real dtype of ``W``, at least
        float32. Computed in float64, differentiable.

    Raises:
        ValueError: If ``W`` is no matrix, or not finite.

    Source: arXiv:1802.05957, Eq. 6.

    Example:
        >>> spectral_norm(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        tensor(2.)
    """
    if W.dim() < 2 or 0 in W.shape[-2:]:
        raise ValueError(
            f'W must be (..., m, n) with m, n > 0, got {tuple(W.shape)}'
        )
    check_finite('W', W)
    wide = W.to(torch.complex128 if W.is_complex() else torch.float64)
    norm: Tensor = torch.linalg.matrix_norm(wide, 2)
    return norm.to(real_dtype(W))


def start_vector(size: int, like: Tensor) -> Tensor:
    """Fixed Gaussian unit vector to start power iteration from, (size,).

    It is the same on every machine and rank, with dtype and device of
    ``like``.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, dtype=torch.float64, generator=generator)
    return F.normalize(start, dim=0).to(like)


@torch.no_grad()
def power_iteration(W: Tensor, u: Tensor, steps: int = 1) -> SingularTriple:
    """Estimate the largest singular value from below.

    Each step is ``v <- W^T u``, ``u <- W v``, both normalized; the estimate
    ``u^T W v`` never exceeds the spectral norm and never decreases from step
    to step, up to rounding. A matrix of zeros gives 0 and leaves ``u``.

    Args:
        W (Tensor): (..., m, n), real, float32 or wider.
        u (Tensor): (..., m), unit vectors to start from, dtype of ``W``.
        steps (int): Number of steps, >= 1. Defaults to 1.

    Returns:
        SingularTriple: u (..., m), sigma (...) and v (..., n), without
        gradient. NaN where ``W`` has a NaN.

    Raises:
        ValueError: If ``u`` does not fit, or ``steps`` is not positive.

    Source: arXiv:1802.05957, Algorithm 1.

    Example:
        >>> W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> found = power_iteration(W, torch.tensor([0.6, 0.8]), steps=20)
        >>> round(found.sigma.item(), 4)
        3.0
    """
    if u.shape != W.shape[:-1]:
        raise ValueError(
            f'u must be {tuple(W.shape[:-1])} for W {tuple(W.shape)}, got '
            f'{tuple(u.shape)}'
        )
    if steps < 1:
        raise ValueError(f'steps must be at least 1, got {steps}')
    for _ in range(steps):
        v = _normalize((W.mT @ u[..., None])[..., 0])
        image = (W @ v[..., None])[..., 0]
        sigma = torch.linalg.vector_norm(image, dim=-1)
        u = torch.where(sigma[..., None] == 0, u, _normalize(image))
    return SingularTriple(u, sigma, v)


def _normalize(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, 1.0, norm)


# --------------------------------------------- convolution along a sequence


def conv_norm_bound(taps: Tensor, points: int | None = None) -> Tensor:
    """Bound the norm of a depthwise convolution of any length.

    The convolution of sequences of length L, causal or centred, zeros
    outside, is a section of the infinite one. The norm of the latter is the
    largest ``|w^(theta)|`` over all frequencies, which is the limit as L
    grows. The discrete Fourier transform samples ``points`` frequencies. A
    trigonometric polynomial of q terms exceeds its samples by a factor of at
    most ``1 / sqrt(cos(pi (q - 1) / points))``: 0.07 % for the default.

    Args:
        taps (Tensor): (..., q), real, the kernel of each channel.
        points (int, optional): Length of the transform, at least 4 q.
            Defaults to None, for 64 q.

    Returns:
        Tensor: (...), >= 0, unit of ``taps``, at least float32. Computed in
        float64, differentiable with the frequency of the maximum held fixed.

    Raises:
        ValueError: If ``taps`` is empty, or ``points`` too small.

    Source: Ehlich and Zeller, Math. Zeitschrift 86 (1964) 41-44.

    Example:
        >>> conv_norm_bound(torch.tensor([[2.0], [-3.0]]))
        tensor([2., 3.])
    """
    count = _count_taps(taps)
    points = 64 * count if points is None else points
    if points < 4 * count:
        raise ValueError(
            f'points must be at least 4 q = {4 * count}, got {points}'
        )
    # for few taps two products are several times quicker than a transform
    turns = torch.arange(points // 2 + 1, dtype=torch.float64) / points
    angles = 2 * math.pi * torch.outer(torch.arange(count).double(), turns)
    wide, angles = taps.double(), angles.to(taps.device)
    seen = _largest(
        (wide @ angles.cos()).square() + (wide @ angles.sin()).square()
    )
    bound = seen / math.sqrt(math.cos(math.pi * (count - 1) / points))
    return bound.to(real_dtype(taps))


def _count_taps(taps: Tensor) -> int:
    if taps.dim() < 1 or taps.shape[-1] == 0 or taps.is_complex():
        raise ValueError(
            'taps must be real (..., q) with q > 0, got '
            f'{taps.dtype} {tuple(taps.shape)}'
        )
    return taps.shape[-1]


def _largest(energy: Tensor) -> Tensor:
    """Root of the largest over the last axis; its index has no gradient."""
    index = energy.detach().argmax(-1, keepdim=True)
    largest = energy.gather(-1, index).squeeze(-1)
    zero = largest == 0  # where the root has no gradient
    return torch.where(zero, 0.0, torch.where(zero, 1.0, largest).sqrt())


# ------------------------------------------------- convolution of an image


def overlap_factor(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] | None = None,
) -> float:
    """Factor by which overlapping patches may exceed the weight's norm.

    A convolution with zero padding has at most this many times the norm of
    its weight as a matrix (out_channels, in_channels * taps): each input
    value is read by at most the factor's square of patches. Where patches do
    not overlap the factor is 1, and the norm is that of the matrix.

    Args:
        kernel_size (Sequence[int]): Taps along each axis.
        stride (Sequence[int]): Stride along each axis.
        dilation (Sequence[int], optional): Dilation along each axis. Defaults
            to None, for 1.

    Returns:
        float: At least 1.

    Example:
        >>> overlap_factor([2, 2], [2, 2]), overlap_factor([2, 2], [1, 1])
        (1.0, 2.0)
    """
    patches = 1
    dilation = dilation or [1] * len(kernel_size)
    for k, s, d in zip(kernel_size, stride, dilation, strict=True):
        patches *= math.ceil(k * math.gcd(s, d) / s)
    return math.sqrt(patches)
