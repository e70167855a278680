"""Points of the unit sphere."""

from collections.abc import Callable

import torch
from torch import Tensor

_BISECTIONS = 60


def to_sphere(x: Tensor) -> Tensor:
    """Scale vectors (..., q), not zero, to length 1."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length


def random_points(count: int, dims: int, seed: int) -> Tensor:
    """Random points of the unit sphere, (count, dims), float64."""
    generator = torch.Generator().manual_seed(seed)
    return to_sphere(
        torch.randn(count, dims, dtype=torch.float64, generator=generator)
    )


def bisect(is_low: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Numbers in (0, 1] at which ``is_low`` changes from True to False.

    Args:
        is_low (Callable[[Tensor], Tensor]): Elementwise condition, assumed
            True at 0 and False at 1.
        like (Tensor): Gives shape, dtype and device.

    Returns:
        Tensor: Upper end of the last interval, where ``is_low`` is False.
    """
    low, high = torch.zeros_like(like), torch.ones_like(like)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        up = is_low(middle)
        low, high = torch.where(up, middle, low), torch.where(up, high, middle)
    return high
