"""Kernels of a given stable rank, closest to given ones on their support."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_choice, real_dtype
from mmstabvim.stability.weights.kernel_baselines import (
    sphere_descent,
    srn_c,
)
from mmstabvim.stability.weights.kernel_flattening import flatten_gains
from mmstabvim.stability.weights.kernel_spectrum import (
    FrequencyPlanes,
    Size,
    check_kernels,
    frequency_planes,
    kernel_stable_rank,
)
from mmstabvim.stability.weights.sphere import bisect, to_sphere

SOLVERS = ('exact', 'rgd', 'srn_c')
MODES = ('reduce', 'equal')
_ENTRIES = 2**23  # values in a working array


def check_kernel_rank(rank: float, count: int, points: int) -> None:
    """Check that kernels of a shape can have a stable rank.

    Args:
        rank (float): Target.
        count (int): Number of taps of the kernel.
        points (int): Number of points of the grid.

    Raises:
        ValueError: If not ``points / count <= rank <= points``.

    Source: Zheng et al., Analysis of the Stable Rank Normalization for
    Convolutional Kernels, Sec. 3.1.
    """
    low, high = points / count, float(points)
    if not low * (1 - 1e-9) <= rank <= high * (1 + 1e-9):
        raise ValueError(
            f'rank must be in [{low:.6g}, {high:.6g}], the range of kernels '
            f'of {count} taps on {points} points, got {rank}'
        )


@torch.no_grad()
def normalize_kernel_stable_rank(
    kernels: Tensor,
    size: Size,
    rank: float,
    mode: str = 'reduce',
    solver: str = 'exact',
    slack: float = 1e-6,
    **options: Any,
) -> Tensor:
    """Kernels whose circular convolution has the stable rank ``rank``.

    Each kernel changes by itself and keeps its support and its largest
    singular value. ``'exact'`` takes the closest one. To reduce the stable
    rank, each frequency gives the closest kernel with a large enough gain
    there, by a scalar equation, and the closest of these is taken. To raise
    it, several frequencies bind at once: the result has the stable rank
    exactly, but is the best of a few local optima.

    The other solvers are published ones, for comparison:
    :func:`sphere_descent` (``'rgd'``), scaled to the largest singular value
    afterwards, and :func:`srn_c`. Both miss the stable rank, ``'srn_c'`` the
    singular value too; :func:`kernel_stable_rank` measures the result.

    Args:
        kernels (Tensor): (..., taps) or (..., taps, taps), real.
        size (int or Sequence[int]): Length, or rows and columns; N points.
        rank (float): Target, in [N / taps, N].
        mode (str): ``'reduce'`` leaves kernels with a stable rank of ``rank``
            or less bitwise as they are, ``'equal'`` raises theirs. Kernels of
            zeros stay. Defaults to ``'reduce'``.
        solver (str): ``'exact'``, ``'rgd'`` or ``'srn_c'``. Defaults to
            ``'exact'``.
        slack (float): Relative error of the stable rank that is let through,
            so that a second application does not change a kernel again by
            rounding. Defaults to 1e-6.
        **options (Any): Options of :func:`sphere_descent`, for ``'rgd'``.

    Returns:
        Tensor: Shape of ``kernels``, at least float32, without gradient;
        computed in float64.

    Raises:
        ValueError: If ``kernels`` do not fit ``size``, or an argument is out
            of range.
        TypeError: If the solver has no such option.

    Source: the problem is Eq. 7 of Zheng et al., Analysis of the Stable Rank
    Normalization for Convolutional Kernels.

    Example:
        >>> kernel = torch.tensor([1.0, -2.0, 0.5])
        >>> changed = normalize_kernel_stable_rank(kernel, size=8, rank=3.0)
        >>> round(kernel_stable_rank(changed, 8).item(), 4)
        3.0
    """
    check_choice('mode', mode, MODES)
    check_choice('solver', solver, SOLVERS)
    shape = check_kernels(kernels, size)
    taps = tuple(kernels.shape[-len(shape) :])
    check_kernel_rank(rank, math.prod(taps), math.prod(shape))
    wide = kernels.double().reshape(-1, *taps)
    found = kernel_stable_rank(wide, shape)
    active = found > rank * (1 + slack)
    if mode == 'equal':
        active |= (found < rank * (1 - slack)) & (found > 0)
    out = kernels.to(real_dtype(kernels)).reshape(-1, *taps).clone()
    index = active.nonzero()[:, 0]
    if not len(index):
        return out.reshape(kernels.shape)
    solve: dict[str, Callable[..., Tensor]] = dict(
        exact=_exact, rgd=_descended, srn_c=srn_c
    )
    changed = solve[solver](wide[index], shape, rank, **options)
    out[index] = changed.to(out.dtype)
    return out.reshape(kernels.shape)


def _descended(
    kernels: Tensor, size: tuple[int, ...], rank: float, **options: Any
) -> Tensor:
    """Descend on the sphere, and keep the largest singular value."""
    return sphere_descent(kernels, size, rank, **options).kernels


def _exact(kernels: Tensor, size: tuple[int, ...], rank: float) -> Tensor:
    """Map kernels (M, *taps) to the closest ones."""
    planes = frequency_planes(tuple(kernels.shape[1:]), size)
    planes = FrequencyPlanes(*(part.to(kernels.device) for part in planes))
    flat = kernels.flatten(1)
    points, count = math.prod(size), flat.shape[1]
    level = min(points / rank, float(count))
    rows = max(1, _ENTRIES // (len(planes.largest) * count))
    split = torch.split(flat, rows)
    parts = [_turned(part, planes, level) for part in split]
    turned = torch.cat(parts)
    peak = planes.gains(flat).amax(-1) / planes.gains(turned).amax(-1)
    return (turned * peak.sqrt()[:, None]).reshape(kernels.shape)


def _turned(flat: Tensor, planes: FrequencyPlanes, level: float) -> Tensor:
    """Nearest unit kernels with the largest squared gain ``level``."""
    unit = to_sphere(flat)
    out = torch.empty_like(unit)
    below = planes.gains(unit).amax(-1) < level
    if below.any():
        out[below] = _raise_gain(unit[below], planes, level)
    if not below.all():
        out[~below] = flatten_gains(unit[~below], planes, level)
    return out


def _raise_gain(unit: Tensor, planes: FrequencyPlanes, level: float) -> Tensor:
    """Nearest unit kernels (M, q) whose largest gain has risen to ``level``.

    The set where some gain is ``level`` or more is a union over frequencies,
    so its nearest point is the nearest over the frequencies.
    """
    gains = planes.gains(unit)
    able = planes.largest >= level * (1 - 1e-12)
    first = torch.where(able, gains, -1.0).argmax(-1)
    guess = _raise_one(unit, planes.at(first), level)
    chord = torch.linalg.vector_norm(guess - unit, dim=-1, keepdim=True)
    # the root of a gain changes by at most the root of its largest eigenvalue
    # times the distance, so frequencies beyond that distance cannot win
    reach = gains.sqrt() + planes.largest.sqrt() * chord
    close = able & (reach >= math.sqrt(level))
    close[torch.arange(len(unit), device=unit.device), first] = True
    channel, frequency = close.nonzero(as_tuple=True)
    turned = _raise_one(unit[channel], planes.at(frequency), level)
    cosine = torch.full_like(gains, -2.0)
    cosine[channel, frequency] = (turned * unit[channel]).sum(-1)
    place = torch.zeros_like(gains, dtype=torch.long)
    place[channel, frequency] = torch.arange(len(turned), device=unit.device)
    best = cosine.argmax(-1, keepdim=True)
    return turned[place.gather(-1, best)[:, 0]]


def _raise_one(unit: Tensor, plane: FrequencyPlanes, level: float) -> Tensor:
    """Nearest unit kernels (M, q) with a gain of ``level`` at one frequency.

    With a multiplier t they are proportional to ``(I - t B)^-1 unit``, 0 <= t
    <= 1 / largest, and the gain rises with t; ``room = 1 - t largest``.
    """
    along, across, rest, beyond = _split(unit, plane)
    flatness = plane.second / plane.largest
    pull = (plane.largest - level) * along.square()
    side = (plane.second - level) * across.square()
    back = level * beyond.square()

    def too_far(room: Tensor) -> Tensor:
        share = room / (1 - flatness + flatness * room)
        return pull + side * share.square() > back * room.square()

    room = bisect(too_far, along)
    across = across / (1 - flatness + flatness * room).clamp(min=1e-300)
    # from the constraint, not from along / room: along may be zero
    height = back + (level - plane.second) * across.square()
    along = torch.where(along < 0, -1.0, 1.0) * height.clamp(min=0).sqrt()
    lean = (plane.largest - level).clamp(min=0).sqrt()
    return _join(along, lean * across, lean * beyond, rest, plane)


def _split(
    unit: Tensor, plane: FrequencyPlanes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates in the plane, direction outside it, and length of that."""
    along = (unit * plane.first_axis).sum(-1)
    across = (unit * plane.second_axis).sum(-1)
    rest = unit - along[:, None] * plane.first_axis
    rest = rest - across[:, None] * plane.second_axis
    beyond = torch.linalg.vector_norm(rest, dim=-1)
    return along, across, rest / beyond.clamp(min=1e-300)[:, None], beyond


def _join(
    along: Tensor,
    across: Tensor,
    beyond: Tensor,
    rest: Tensor,
    plane: FrequencyPlanes,
) -> Tensor:
    """Unit kernels from coordinates up to a common factor."""
    x = along[:, None] * plane.first_axis + across[:, None] * plane.second_axis
    return to_sphere(x + beyond[:, None] * rest)
