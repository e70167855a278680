"""Stable rank of matrices, and the closest matrix with a given one."""

import math

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_finite, real_dtype


def stable_rank(W: Tensor) -> Tensor:
    """Stable rank ``||W||_F^2 / ||W||_2^2``.

    It is the effective number of directions that carry the energy of the
    matrix, and does not depend on its scale.

    Args:
        W (Tensor): (..., m, n), real.

    Returns:
        Tensor: (...), in [1, rank of W], 0 for W = 0; at least float32,
        computed in float64.

    Raises:
        ValueError: If ``W`` is no real matrix or not finite.

    Source: arXiv:1906.04659, Eq. 2.

    Example:
        >>> stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
        tensor(1.5000)
    """
    wide = _double('W', W)
    norm = torch.linalg.matrix_norm(wide, 2)
    total = wide.square().sum((-2, -1))
    zero = norm == 0
    ratio = total / torch.where(zero, 1.0, norm).square()
    return torch.where(zero, 0.0, ratio).to(real_dtype(W))


def normalize_stable_rank(
    W: Tensor,
    rank: float,
    preserved: int = 1,
    slack: float = 1e-6,
) -> Tensor:
    """Closest matrix in the Frobenius norm whose stable rank is ``rank``.

    With ``S1`` the part of the first ``preserved`` singular values and ``S2 =
    W - S1`` it is ``S1 + gamma S2``, ``gamma = sqrt(rank sigma_1^2 -
    ||S1||_F^2) / ||S2||_F``: these singular values stay, the others shrink by
    the same factor below 1. With ``preserved=0`` the first one may grow, and
    the result is closer still. A matrix with a stable rank of ``rank`` or
    less stays bitwise as it is.

    Differentiable, with singular vectors held constant.

    Args:
        W (Tensor): (..., m, n), real.
        rank (float): Target, >= 1.
        preserved (int): Number of singular values that keep their value, 0
            to min(m, n). Defaults to 1.
        slack (float): Relative excess of the stable rank that is let through,
            so that a second application does not change the matrix again by
            rounding. Defaults to 1e-6.

    Returns:
        Tensor: Shape of ``W``, at least float32; computed in float64.

    Raises:
        ValueError: If ``W`` is no real matrix or not finite, an argument is
            out of range, or the preserved singular values alone have a larger
            stable rank than ``rank``.

    Source: arXiv:1906.04659, Theorem 1.

    Example:
        >>> W = torch.diag(torch.tensor([2.0, 2.0]))
        >>> stable_rank(normalize_stable_rank(W, 1.25))
        tensor(1.2500)
    """
    _check_target(rank)
    wide = _double('W', W)
    if not 0 <= preserved <= min(W.shape[-2:]):
        raise ValueError(
            f'preserved must be in 0..{min(W.shape[-2:])} for '
            f'{tuple(W.shape)}, got {preserved}'
        )
    left, right = _leading_vectors(wide.detach(), max(preserved, 1))
    values = (left * (wide @ right)).sum(-2)  # (..., k)
    first = (left * values[..., None, :]) @ right.mT
    rest = wide - first
    total = wide.square().sum((-2, -1))
    peak = values[..., 0].square()
    active = total > peak * rank * (1 + slack)
    inner, outer = _factors(values, rest, rank, preserved, active)
    changed = inner[..., None, None] * first + outer[..., None, None] * rest
    dtype = real_dtype(W)
    return torch.where(active[..., None, None], changed.to(dtype), W.to(dtype))


def _check_target(rank: float) -> None:
    if not (rank >= 1 and math.isfinite(rank)):
        raise ValueError(f'rank must be at least 1, got {rank}')


def _double(name: str, W: Tensor) -> Tensor:
    if W.dim() < 2 or W.is_complex() or 0 in W.shape[-2:]:
        raise ValueError(
            f'{name} must be real and (..., m, n) with m, n > 0, got '
            f'{W.dtype} {tuple(W.shape)}'
        )
    check_finite(name, W)
    return W.double()


def _factors(
    values: Tensor, rest: Tensor, rank: float, preserved: int, active: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of S1 and S2, (...) each, valid where ``active``."""
    peak = values[..., 0].square()
    room = rank * peak - values.square().sum(-1)
    if preserved > 1 and bool((active & (room < -1e-9 * peak)).any()):
        worst = (values.square().sum(-1) / peak)[active].max()
        raise ValueError(
            f'rank must be at least {worst.item():.6g}, the stable rank of '
            f'the {preserved} preserved singular values, got {rank}'
        )
    # no root and no quotient of zero, whose gradients are not finite
    root = torch.where(room > 0, room, 1.0).sqrt() * (room > 0)
    size = torch.where(active, rest.square().sum((-2, -1)), 1.0).sqrt()
    gamma = root / size
    if preserved:
        return torch.ones_like(gamma), gamma
    # S1 and S2 scaled by t and t gamma, t at the foot of the perpendicular
    peak = torch.where(active, peak, 1.0)
    t = (1 + size * root / peak) / rank
    return t, t * gamma


@torch.no_grad()
def _leading_vectors(W: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """First left and right singular vectors, (..., m, k) and (..., n, k)."""
    if W.shape[-2] < W.shape[-1]:
        right, left = _leading_vectors(W.mT, count)
        return left, right
    # the small Gram matrix is quicker than all singular vectors, and as
    # accurate for the largest values
    basis = torch.linalg.eigh(W.mT @ W).eigenvectors[..., -count:]
    left, _, mixing = torch.linalg.svd(W @ basis, full_matrices=False)
    return left, basis @ mixing.mT
