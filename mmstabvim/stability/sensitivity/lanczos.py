"""Extreme eigenvalues of a symmetric map, from its products with vectors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Extremes(NamedTuple):
    """Smallest and largest eigenvalue with their errors.

    Within ``*_error`` of each estimate there is an eigenvalue, as far as the
    products are symmetric and exact. It need not be the extreme one. The
    estimates never lie outside the spectrum.

    Example:
        >>> Extremes(-3.0, 2.0, 0.0, 0.0).norm
        3.0
    """

    smallest: float
    largest: float
    smallest_error: float
    largest_error: float

    @property
    def norm(self) -> float:
        """Largest absolute value."""
        return max(abs(self.smallest), abs(self.largest))

    @property
    def norm_error(self) -> float:
        """Error of the eigenvalue that gives the norm."""
        if abs(self.smallest) > abs(self.largest):
            return self.smallest_error
        return self.largest_error


@torch.no_grad()
def lanczos_extremes(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    steps: int = 20,
    seed: int = 0,
) -> Extremes:
    """Extreme eigenvalues by Lanczos' method with full orthogonalization.

    They are exact, up to rounding, when ``steps`` reaches the number of
    distinct eigenvalues; the iteration stops there.

    Args:
        product (Callable): Maps a vector like ``like`` to its image under a
            symmetric matrix.
        like (Tensor): (size,), gives dtype and device of the vectors. All
            ``steps`` vectors are kept in memory.
        steps (int): Products, >= 1. Defaults to 20.
        seed (int): Seed of the random start. Defaults to 0.

    Returns:
        Extremes: NaN with an infinite error if a product is not finite.

    Raises:
        ValueError: If ``steps`` is not positive or ``like`` no vector.

    Source: Parlett, The Symmetric Eigenvalue Problem, 1998, Chapter 13.

    Example:
        >>> A = torch.diag(torch.tensor([-3.0, 1.0, 2.0]))
        >>> ends = lanczos_extremes(lambda v: A @ v, torch.zeros(3))
        >>> round(ends.smallest, 4), round(ends.largest, 4)
        (-3.0, 2.0)
    """
    if steps < 1:
        raise ValueError(f'steps must be at least 1, got {steps}')
    if like.dim() != 1 or like.numel() == 0:
        raise ValueError(f'like must be a vector, got {tuple(like.shape)}')
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(like), dtype=torch.float64, generator=generator)
    basis = [(start / start.norm()).to(like)]
    diagonal: list[float] = []
    off: list[float] = []
    for _ in range(min(steps, len(like))):
        image = product(basis[-1])
        alpha = float(image @ basis[-1])
        # twice: rounding brings components back
        for _ in range(2):
            for vector in basis:
                image = image - (image @ vector) * vector
        beta = float(image.norm())
        diagonal.append(alpha)
        off.append(beta)
        if not (abs(alpha) < torch.inf and beta < torch.inf):
            return Extremes(*[torch.nan] * 2, *[torch.inf] * 2)
        size = max(map(abs, (*diagonal, *off[:-1])))
        if beta <= 100 * torch.finfo(like.dtype).eps * size:
            break
        basis.append(image / beta)
    return _ends(diagonal, off)


def _ends(diagonal: list[float], off: list[float]) -> Extremes:
    """Eigenvalues of the tridiagonal matrix, and their residuals."""
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    beta = torch.tensor(off[:-1], dtype=torch.float64)
    T = T + torch.diag(beta, 1) + torch.diag(beta, -1)
    values, vectors = torch.linalg.eigh(T)
    errors = off[-1] * vectors[-1].abs()
    return Extremes(
        float(values[0]),
        float(values[-1]),
        float(errors[0]),
        float(errors[-1]),
    )
