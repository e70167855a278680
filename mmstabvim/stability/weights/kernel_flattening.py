"""Closest kernels with gains bounded at every frequency.

Several frequencies bind at once, and on the sphere their bounds leave a set
that is not convex. A logarithmic barrier is followed to a local optimum from
several starts.
"""

import torch
from torch import Tensor

from mmstabvim.stability.weights.kernel_spectrum import FrequencyPlanes
from mmstabvim.stability.weights.sphere import bisect, to_sphere

_STARTS = 4
_WEIGHTS = [0.1 * 0.3**k for k in range(18)]
_NEWTON_STEPS = 3
_LINE = [0.3**k for k in range(7)]


def flatten_gains(
    unit: Tensor, planes: FrequencyPlanes, level: float
) -> Tensor:
    """Unit kernels near given ones with the largest gain ``level``.

    It starts at the single taps of the largest entries, whose gains are all
    1, and takes the closest result.

    Args:
        unit (Tensor): (M, q), length 1, with a gain above ``level``.
        planes (FrequencyPlanes): Planes of all frequencies.
        level (float): Bound of the squared gains, in [1, q].

    Returns:
        Tensor: (M, q), length 1.
    """
    starts = min(_STARTS, unit.shape[-1])
    place = unit.abs().topk(starts, -1).indices
    sign = torch.where(unit.gather(-1, place) < 0, -1.0, 1.0)
    inside = torch.zeros_like(unit)[:, None].repeat(1, starts, 1)
    inside.scatter_(-1, place[..., None], sign[..., None].to(unit))
    given = unit[:, None].expand_as(inside).flatten(0, 1)
    inside = inside.flatten(0, 1)
    if level > 1 + 1e-9:
        inside = _Barrier(given, planes, level).follow(inside)
    found = _first_inside(given, inside, planes, level)
    best = (found * given).sum(-1).reshape(-1, starts).argmax(-1)
    rows = torch.arange(len(unit), device=unit.device)
    return torch.unflatten(found, 0, (-1, starts))[rows, best]


def _first_inside(
    outside: Tensor, inside: Tensor, planes: FrequencyPlanes, level: float
) -> Tensor:
    """Points where lines from outside the set to points in it enter it."""

    def violates(share: Tensor) -> Tensor:
        x = to_sphere(torch.lerp(outside, inside, share))
        return (planes.gains(x).amax(-1) > level)[..., None]

    share = bisect(violates, outside[..., :1])
    return to_sphere(torch.lerp(outside, inside, share))


class _Barrier:
    """Newton's method on ``-a^T x - t sum log(level - gain)``, |x| = 1.

    Args:
        given (Tensor): (P, q), the points a.
        planes (FrequencyPlanes): Planes of all frequencies.
        level (float): Bound of the squared gains.
    """

    def __init__(
        self, given: Tensor, planes: FrequencyPlanes, level: float
    ) -> None:
        self.given, self.level = given, level
        first = planes.largest.sqrt()[:, None] * planes.first_axis
        second = planes.second.sqrt()[:, None] * planes.second_axis
        # the gain of a frequency is the sum of squares of two products
        self.waves = torch.stack([first, second])  # (2, F, q)
        self.forms = (self.waves[..., None] * self.waves[..., None, :]).sum(0)

    def follow(self, x: Tensor) -> Tensor:
        """Follow points inside to optima, as the barrier's weight t falls."""
        for weight in _WEIGHTS:
            for _ in range(_NEWTON_STEPS):
                x = self._improve(x, self._direction(x, weight), weight)
        return x

    def _parts(self, x: Tensor) -> Tensor:
        """Products with the waves, (..., 2, F)."""
        products = x @ self.waves.flatten(0, 1).mT
        return torch.unflatten(products, -1, (2, -1))

    def _value(self, x: Tensor, weight: float) -> Tensor:
        """Values at x (P, lines, q), infinite outside."""
        room = self.level - self._parts(x).square().sum(-2)
        barrier = room.clamp(min=1e-300).log().sum(-1)
        value = -(x * self.given[:, None]).sum(-1) - weight * barrier
        return torch.where((room > 0).all(-1), value, torch.inf)

    def _direction(self, x: Tensor, weight: float) -> Tensor:
        """Newton step in the tangent plane, a descent direction."""
        parts = self._parts(x)
        inverse = 1 / (self.level - parts.square().sum(-2))  # (P, F)
        slopes = (parts * inverse[:, None])[..., None] * self.waves
        slopes = slopes.sum(1)  # (P, F, q), half of each gradient
        gradient = 2 * weight * slopes.sum(1) - self.given
        hessian = 4 * slopes.mT @ slopes
        forms = inverse @ self.forms.flatten(1)
        hessian = weight * (hessian + 2 * forms.reshape(hessian.shape))
        tangent = torch.eye(x.shape[-1]).to(x) - x[..., None] * x[:, None]
        curvature = -(x * gradient).sum(-1).clamp(max=-1e-3)
        hessian = tangent @ hessian @ tangent
        hessian = hessian + curvature[:, None, None] * tangent
        # the last term makes it regular and acts outside the tangent plane
        hessian = hessian + x[..., None] * x[:, None]
        slope = tangent @ gradient[..., None]
        step: Tensor = torch.linalg.solve(hessian, slope)[..., 0]
        return -step

    def _improve(self, x: Tensor, step: Tensor, weight: float) -> Tensor:
        """Best of a few lengths of the step, or the point itself."""
        lengths = torch.tensor([*_LINE, 0.0]).to(x)
        points = to_sphere(x[:, None] + lengths[:, None] * step[:, None])
        points[:, -1] = x
        best = self._value(points, weight).argmin(-1)
        return points[torch.arange(len(x), device=x.device), best]
