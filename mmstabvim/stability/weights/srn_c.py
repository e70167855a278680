"""SRN-C, stable rank normalization carried over from matrices to kernels.

Kept to compare with: the kernel that stands for the first singular value has
no convolution of rank one, so neither the largest singular value nor the
stable rank come out as asked.
"""

import math

import torch
from torch import Tensor

from mmstabvim.stability.weights.kernel_spectrum import (
    Size,
    check_kernels,
    phases,
    squared_gains,
)


@torch.no_grad()
def rank_one_kernel(kernels: Tensor, size: Size) -> Tensor:
    """Gradient of ``u^T (x * v)`` over the taps of x, for singular u, v.

    With (u, v) the first singular pair of the circular convolution with the
    kernel it is ``cos(phase of each tap - phase of the gain)`` at the
    frequency of the largest gain. Any pair of that frequency gives the same;
    if several frequencies tie, the first is taken.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps), not zero.
        size (int or Sequence[int]): Length, or rows and columns.

    Returns:
        Tensor: As ``kernels``, float64; on the torus its convolution has
        singular values up to the number of taps, not 1.

    Raises:
        ValueError: As :func:`check_kernels`.

    Source: Zheng et al., Analysis of the Stable Rank Normalization for
    Convolutional Kernels, Eq. 6.
    """
    shape = check_kernels(kernels, size)
    flat = kernels.double().flatten(-len(shape))
    angle = phases(kernels.shape[-len(shape) :], shape, half=True)
    best = squared_gains(kernels, shape).argmax(-1)
    angle = angle.to(kernels.device)[best]  # (..., q)
    real, imag = (
        (flat * wave).sum(-1, keepdim=True)
        for wave in (angle.cos(), angle.sin())
    )
    return torch.cos(angle - torch.atan2(imag, real)).reshape(kernels.shape)


@torch.no_grad()
def srn_c(kernels: Tensor, size: Size, rank: float) -> Tensor:
    """``sigma (a_1 + gamma (a / sigma - a_1))``, the normalized kernel.

    ``a_1`` is :func:`rank_one_kernel`, ``sigma`` the largest singular value
    and ``gamma = sqrt(rank - 1) / ||C(a / sigma) - u v^T||_F``.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps), not zero.
        size (int or Sequence[int]): Length, or rows and columns; N points.
        rank (float): Target of the stable rank, >= 1; in general missed.

    Returns:
        Tensor: As ``kernels``, float64.

    Raises:
        ValueError: As :func:`check_kernels`, or if ``rank`` is below 1.

    Source: Tanay et al., arXiv:2010.05099, as restated in Zheng et al.,
    Analysis of the Stable Rank Normalization for Convolutional Kernels, Eq. 5.
    """
    if not rank >= 1:
        raise ValueError(f'rank must be at least 1, got {rank}')
    shape = check_kernels(kernels, size)
    axes = tuple(range(-len(shape), 0))
    sigma = squared_gains(kernels, shape).amax(-1).sqrt()
    sigma = sigma.reshape(*sigma.shape, *[1] * len(shape))
    unit = kernels.double() / sigma
    first = rank_one_kernel(kernels, shape)
    energy = math.prod(shape) * unit.square().sum(axes, keepdim=True)
    gamma = ((rank - 1) / (energy - 1)).sqrt()
    return sigma * (first + gamma * (unit - first))
