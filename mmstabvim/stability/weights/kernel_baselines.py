"""Published normalizations of kernels, kept for comparison.

SRN-C carries stable rank normalization over from matrices. The kernel that
replaces the first singular value has no convolution of rank one, so neither
the largest singular value nor the stable rank come out as asked.

Descent on the sphere replaces the largest gain by a smooth bound above it and
penalizes the distance, so its minimum misses the stable rank asked for.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmstabvim.stability.weights.kernel_spectrum import (
    Size,
    check_kernels,
    kernel_stable_rank,
    phases,
    squared_gains,
)
from mmstabvim.stability.weights.sphere import random_points, to_sphere


@torch.no_grad()
def rank_one_kernel(kernels: Tensor, size: Size) -> Tensor:
    """Gradient of ``u^T (x * v)`` over the taps of x, for singular u, v.

    (u, v) is the first singular pair of the circular convolution with the
    kernel. The gradient is ``cos(phase of each tap - phase of the gain)`` at
    the frequency of the largest gain. Every pair of that frequency gives the
    same; if several frequencies tie, the first is taken.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps), not zero.
        size (int or Sequence[int]): Length, or rows and columns.

    Returns:
        Tensor: Shape of ``kernels``, float64. On the torus its convolution
        has singular values up to the number of taps, not 1.

    Raises:
        ValueError: If ``kernels`` do not fit ``size``.

    Source: Zheng et al., Analysis of the Stable Rank Normalization for
    Convolutional Kernels, Eq. 6.

    Example:
        >>> rank_one_kernel(torch.tensor([1.0, -2.0]), size=4).float()
        tensor([ 1., -1.])
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
    """SRN-C: the kernel ``sigma (a_1 + gamma (a / sigma - a_1))``.

    ``a_1`` is :func:`rank_one_kernel`, ``sigma`` the largest singular value
    and ``gamma = sqrt(rank - 1) / ||C(a / sigma) - u v^T||_F``.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps), not zero.
        size (int or Sequence[int]): Length, or rows and columns; N points.
        rank (float): Target of the stable rank, >= 1; in general missed.

    Returns:
        Tensor: Shape of ``kernels``, float64.

    Raises:
        ValueError: If ``kernels`` do not fit ``size``, or ``rank`` is below 1.

    Source: Tanay et al., arXiv:2010.05099, as restated in Zheng et al.,
    Analysis of the Stable Rank Normalization for Convolutional Kernels, Eq. 5.

    Example:
        >>> kernel = srn_c(torch.tensor([1.0, -2.0, 0.5]), size=8, rank=4.0)
        >>> round(kernel_stable_rank(kernel, 8).item(), 4)  # not 4
        4.2251
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


class Descent(NamedTuple):
    """Result of a descent.

    Attributes:
        kernels (Tensor): (..., taps), scaled to the largest singular value of
            the given ones; float64.
        stable_rank (Tensor): (...), stable rank reached.
        gain_ratio (Tensor): (...), largest singular value before that scaling
            over the given one: 1 only if the stable rank was met.
        point (Tensor): (M, q), last point on the unit sphere.
    """

    kernels: Tensor
    stable_rank: Tensor
    gain_ratio: Tensor
    point: Tensor


class SphereObjective:
    """Objective of the descent on the unit sphere.

    ``h(z) = (g(z) - N / r)^2 + penalty N ||sqrt(r M^2 / N) z - a||^2``. Here
    ``g`` is the log-sum-exp of the squared gains with sharpness ``alpha``; it
    exceeds the largest by up to ``ln(N) / alpha``.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps), the given a.
        size (int or Sequence[int]): Length, or rows and columns; N points.
        rank (float): Target r of the stable rank, > 0.
        alpha (float): Sharpness, > 0. Defaults to 10.0.
        penalty (float): Weight of the distance, >= 0. Defaults to 0.1.

    Raises:
        ValueError: If ``kernels`` do not fit ``size``, or a number is out of
            range.

    Source: Zheng et al., Analysis of the Stable Rank Normalization for
    Convolutional Kernels, Eq. 14 and 16.
    """

    def __init__(
        self,
        kernels: Tensor,
        size: Size,
        rank: float,
        alpha: float = 10.0,
        penalty: float = 0.1,
    ) -> None:
        shape = check_kernels(kernels, size)
        if not (rank > 0 and alpha > 0 and penalty >= 0):
            raise ValueError(
                'want rank > 0, alpha > 0, penalty >= 0, got '
                f'rank={rank}, alpha={alpha}, penalty={penalty}'
            )
        taps = kernels.shape[-len(shape) :]
        self.given = kernels.double().reshape(-1, math.prod(taps))
        angle = phases(taps, shape).to(kernels.device)
        self._waves = torch.cat([angle.cos(), angle.sin()])  # (2 N, q)
        self._points, self.alpha = math.prod(shape), alpha
        self._weight = penalty * self._points
        self._level = self._points / rank
        peak = squared_gains(kernels, shape).amax(-1).reshape(-1, 1)
        self.radius = (rank * peak / self._points).sqrt()  # (M, 1)

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values (M,) and Euclidean gradients (M, q) at z (M, q)."""
        parts = z @ self._waves.mT  # (M, 2 N)
        gains = torch.unflatten(parts.square(), -1, (2, -1)).sum(-2)
        scaled = self.alpha * gains
        excess = scaled.logsumexp(-1) / self.alpha - self._level
        share = scaled.softmax(-1).repeat(1, 2)
        slope = 2 * (share * parts) @ self._waves
        off = self.radius * z - self.given
        value = excess.square() + self._weight * off.square().sum(-1)
        pull = 2 * self._weight * self.radius * off
        return value, 2 * excess[:, None] * slope + pull


@torch.no_grad()
def sphere_descent(
    kernels: Tensor,
    size: Size,
    rank: float,
    alpha: float = 10.0,
    penalty: float = 0.1,
    step: float = 1e-3,
    steps: int = 20_000,
    seed: int = 0,
    start: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Descent:
    """Riemannian gradient descent for kernels of a given stable rank.

    Each step follows the gradient in the tangent plane and goes back to the
    sphere. All kernels descend at once.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps), not zero.
        size (int or Sequence[int]): Length, or rows and columns; N points.
        rank (float): Target of the stable rank.
        alpha (float): Sharpness of the largest gain, > 0. Defaults to 10.0.
        penalty (float): Weight of the distance, >= 0. Defaults to 0.1.
        step (float): Step size, > 0. Defaults to 1e-3.
        steps (int): Number of steps, >= 0. Defaults to 20000.
        seed (int): Seed of the random start. Defaults to 0.
        start (Tensor, optional): Start on the unit sphere, (M, q). Defaults
            to None, for a random one.
        callback (Callable, optional): Called with the number, the values (M,)
            and the point (M, q) before each step and at the end.

    Returns:
        Descent: Kernels and the stable rank reached.

    Raises:
        ValueError: If an argument is out of range.

    Source: Zheng et al., Analysis of the Stable Rank Normalization for
    Convolutional Kernels, Eq. 16 to 19.

    Example:
        >>> kernel = torch.tensor([1.0, -2.0, 0.5])
        >>> found = sphere_descent(kernel, 8, rank=4.0, step=0.01, steps=500)
        >>> round(found.stable_rank.item(), 2)  # not 4
        3.76
    """
    if not (step > 0 and steps >= 0):
        raise ValueError(
            f'want step > 0, steps >= 0, got step={step}, steps={steps}'
        )
    objective = SphereObjective(kernels, size, rank, alpha, penalty)
    given = objective.given
    if start is None:
        start = random_points(len(given), given.shape[1], seed)
    if start.shape != given.shape:
        raise ValueError(
            f'start must be {tuple(given.shape)}, got {tuple(start.shape)}'
        )
    z = start.to(given)
    for number in range(steps + 1):
        value, gradient = objective.value_and_gradient(z)
        if callback is not None:
            callback(number, value, z)
        if number == steps:
            break
        inward = (gradient * z).sum(-1, keepdim=True) * z
        z = to_sphere(z - step * (gradient - inward))
    return _end(kernels, size, objective, z)


def _end(
    kernels: Tensor, size: Size, objective: SphereObjective, z: Tensor
) -> Descent:
    """Scale and measure the last point."""
    found = (objective.radius * z).reshape(kernels.shape)
    wanted = squared_gains(kernels, size).amax(-1)
    ratio = (squared_gains(found, size).amax(-1) / wanted).sqrt()
    scale = ratio.reshape(*ratio.shape, *[1] * (kernels.dim() - ratio.dim()))
    return Descent(found / scale, kernel_stable_rank(found, size), ratio, z)
