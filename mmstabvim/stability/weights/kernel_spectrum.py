"""Spectra of convolutions with one kernel per channel, on a periodic grid.

With circular borders the convolution by a kernel is a (multi-level) circulant
matrix: its singular values are the moduli of the kernel's discrete Fourier
transform.
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_choice, check_finite, real_dtype

GRANULARITIES = ('channel', 'layer')
Size = int | Sequence[int]


def check_kernels(kernels: Tensor, size: Size) -> tuple[int, ...]:
    """Check that kernels fit a grid.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps).
        size (int or Sequence[int]): Length, or rows and columns.

    Returns:
        tuple[int, ...]: ``size``, one number per dimension.

    Raises:
        ValueError: If ``kernels`` is complex, not finite, has too few
            dimensions, or more taps than the grid has points.
    """
    shape = (size,) if isinstance(size, int) else tuple(size)
    taps = tuple(kernels.shape[-len(shape) :])
    fits = (
        len(shape) > 0
        and kernels.numel() > 0
        and len(taps) == len(shape)
        and all(0 < k <= n for k, n in zip(taps, shape, strict=True))
    )
    if kernels.is_complex() or not fits:
        raise ValueError(
            f'kernels must be real with 1 to {shape} taps, got '
            f'{kernels.dtype} {tuple(kernels.shape)}'
        )
    check_finite('kernels', kernels)
    return shape


def squared_gains(kernels: Tensor, size: Size) -> Tensor:
    """Squared singular values of a circular convolution, by frequency.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps), real.
        size (int or Sequence[int]): Length, or rows and columns.

    Returns:
        Tensor: (..., frequencies), >= 0, float64, without the conjugate
        frequencies of the last axis.

    Raises:
        ValueError: If ``kernels`` do not fit ``size``.

    Example:
        >>> squared_gains(torch.tensor([1.0, 1.0]), size=4).float()
        tensor([4., 2., 0.])
    """
    shape = check_kernels(kernels, size)
    axes = tuple(range(-len(shape), 0))
    spectrum: Tensor = torch.fft.rfftn(kernels.double(), s=shape, dim=axes)
    return spectrum.flatten(-len(shape)).abs().square()


def kernel_stable_rank(
    kernels: Tensor, size: Size, granularity: str = 'channel'
) -> Tensor:
    """Stable rank of circular convolutions, ``N ||x||^2 / max gain^2``.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps), real.
        size (int or Sequence[int]): Length, or rows and columns; N points.
        granularity (str): ``'channel'`` for each kernel by itself;
            ``'layer'`` for one matrix of all channels in the dimension before
            the taps, a depthwise layer. Defaults to ``'channel'``.

    Returns:
        Tensor: (...), in [N / taps, N] per channel, 0 for a kernel of zeros;
        at least float32, computed in float64. Per layer without the dimension
        of the channels.

    Raises:
        ValueError: If ``kernels`` do not fit ``size``.

    Source: Zheng et al., Analysis of the Stable Rank Normalization for
    Convolutional Kernels, Eq. 9.

    Example:
        >>> kernel_stable_rank(torch.tensor([1.0, 1.0]), size=4)
        tensor(2.)
    """
    check_choice('granularity', granularity, GRANULARITIES)
    shape = check_kernels(kernels, size)
    flat = kernels.double().flatten(-len(shape))
    energy = flat.square().sum(-1)
    peak = squared_gains(kernels, shape).amax(-1)
    if granularity == 'layer':
        energy, peak = energy.sum(-1), peak.amax(-1)
    zero = peak == 0
    ratio = math.prod(shape) * energy / torch.where(zero, 1.0, peak)
    return torch.where(zero, 0.0, ratio).to(real_dtype(kernels))


def causal_stable_rank(kernels: Tensor, length: int) -> Tensor:
    """Stable rank of causal convolutions that start from zeros.

    A layer computes this convolution on a sequence: a triangular Toeplitz
    matrix, whose stable rank differs from the circular one.

    Args:
        kernels (Tensor): (..., taps), real; the last entry weighs the current
            token, as in ``Conv1d``.
        length (int): Tokens; each kernel takes a (length, length) matrix.

    Returns:
        Tensor: (...), 0 for a kernel of zeros; at least float32, computed in
        float64.

    Raises:
        ValueError: If ``kernels`` do not fit ``length``.

    Example:
        >>> causal_stable_rank(torch.tensor([0.0, 2.0]), length=4)
        tensor(4.)
    """
    check_kernels(kernels, length)
    taps = kernels.double().flip(-1)  # by lag
    matrix = kernels.new_zeros(
        *kernels.shape[:-1], length, length, dtype=torch.float64
    )
    for lag in range(taps.shape[-1]):
        diagonal = matrix.diagonal(-lag, dim1=-2, dim2=-1)
        diagonal += taps[..., lag, None]
    norm = torch.linalg.matrix_norm(matrix, 2)
    zero = norm == 0
    energy = matrix.square().sum((-2, -1))
    ratio = energy / torch.where(zero, 1.0, norm).square()
    return torch.where(zero, 0.0, ratio).to(real_dtype(kernels))


class FrequencyPlanes(NamedTuple):
    """Eigenvalues and eigenvectors of the gain of each frequency.

    The squared gain of frequency l is a quadratic form of the taps, ``x^T B_l
    x`` with ``B_l = cos_l cos_l^T + sin_l sin_l^T``, whose rank is at most 2.

    Attributes:
        largest (Tensor): (frequencies,), ``(q + |c_l|) / 2`` for q taps and
            ``c_l`` the sum of ``exp(2 i phase)`` over them.
        second (Tensor): (frequencies,), ``(q - |c_l|) / 2``; the other
            eigenvalues are zero.
        first_axis (Tensor): (frequencies, q), unit eigenvector of
            ``largest``.
        second_axis (Tensor): (frequencies, q), that of ``second``; zero where
            ``second`` is.
    """

    largest: Tensor
    second: Tensor
    first_axis: Tensor
    second_axis: Tensor

    def gains(self, x: Tensor) -> Tensor:
        """Squared gains (..., frequencies) of taps (..., q)."""
        along = (x @ self.first_axis.mT).square()
        across = (x @ self.second_axis.mT).square()
        return self.largest * along + self.second * across

    def at(self, frequency: Tensor) -> 'FrequencyPlanes':
        """Select the planes of some frequencies."""
        return FrequencyPlanes(*(part[frequency] for part in self))


def phases(
    taps: Sequence[int], size: Sequence[int], half: bool = False
) -> Tensor:
    """Phase of each tap at each frequency.

    Args:
        taps (Sequence[int]): Taps of the kernel, per dimension.
        size (Sequence[int]): Points of the grid, per dimension.
        half (bool): Leave out the conjugates in the last dimension, like
            :func:`squared_gains`. Defaults to False.

    Returns:
        Tensor: (frequencies, product of taps), rad, float64.
    """
    counts = list(size)
    if half:
        counts[-1] = counts[-1] // 2 + 1
    frequency = torch.tensor(
        list(itertools.product(*map(range, counts))), dtype=torch.float64
    )
    place = torch.tensor(
        list(itertools.product(*map(range, taps))), dtype=torch.float64
    )
    period = torch.tensor(list(size), dtype=torch.float64)
    return 2 * math.pi * (frequency / period) @ place.mT


@lru_cache(maxsize=64)
def frequency_planes(
    taps: tuple[int, ...], size: tuple[int, ...]
) -> FrequencyPlanes:
    """Planes of the frequencies of a kernel shape on a grid.

    Args:
        taps (tuple[int, ...]): Taps of the kernel, per dimension.
        size (tuple[int, ...]): Points of the grid, per dimension.

    Returns:
        FrequencyPlanes: Float64 on the CPU, in the order of
        :func:`squared_gains`; the tensors are shared by all callers.

    Source: Zheng et al., Analysis of the Stable Rank Normalization for
    Convolutional Kernels, Sec. 3.1.

    Example:
        >>> planes = frequency_planes((2,), (4,))
        >>> planes.gains(torch.ones(2).double()).float()
        tensor([4., 2., 0.])
    """
    angle = phases(taps, size, half=True)
    wave = torch.polar(torch.ones_like(angle), angle)
    square = wave.square().sum(-1)
    # a rotation that makes real and imaginary part orthogonal
    turn = -square.angle() / 2
    wave = wave * torch.polar(torch.ones_like(turn), turn)[:, None]
    count = wave.shape[-1]
    largest = (count + square.abs()) / 2
    second = (count - square.abs()) / 2
    flat = second < 1e-12 * count  # one wave, not two
    second = torch.where(flat, 0.0, second)
    across = wave.imag / torch.where(flat, 1.0, second).sqrt()[:, None]
    return FrequencyPlanes(
        largest,
        second,
        wave.real / largest.sqrt()[:, None],
        torch.where(flat[:, None], 0.0, across),
    )
