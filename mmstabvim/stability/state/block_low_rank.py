"""Dense matrices written as blocks on the diagonal plus a low-rank term."""

import torch
from torch import Tensor

from mmstabvim.stability.inputs import (
    check_finite,
    check_square,
    dense,
    real_dtype,
)


def fit_block_low_rank(
    A: Tensor,
    block_size: int,
    rank: int,
    sweeps: int = 100,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit ``blkdiag(blocks) + U V^T`` to dense matrices by least squares.

    Each sweep takes the best low-rank part for the blocks (a truncated
    singular value decomposition), then the best blocks for the low-rank part.
    No sweep makes the fit worse. In general a residual is left, so the fit
    has other eigenvalues than ``A``. The result has no gradient.

    Args:
        A (Tensor): (..., N, N), real.
        block_size (int): Size b of a block, dividing N.
        rank (int): Rank r of ``U V^T``, 0 to N.
        sweeps (int): Most alternations, > 0; fewer where they no longer
            help. Defaults to 100.
        start (tuple[Tensor, Tensor], optional): U and V to start from,
            (..., N, r) each. A fixed start replaces it where it is absent or
            ``U V^T = 0``.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor]: blocks (..., N / b, b, b), U
        and V (..., N, r) with singular values split evenly, and the relative
        residual ``||blkdiag + U V^T - A||_F / ||A||_F`` (...), 0 for A = 0.
        At least float32, computed in float64.

    Raises:
        ValueError: If ``A`` is not square, not finite or complex, or a size
            does not fit.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0])) + 1
        >>> blocks, U, V, residual = fit_block_low_rank(A, 1, 1)
        >>> residual.item() < 1e-5
        True
    """
    if A.is_complex():
        raise ValueError(f'A must be real, got {A.dtype}')
    check_square('A', A)
    size = A.shape[-1]
    if block_size < 1 or size % block_size:
        raise ValueError(f'block_size must divide N={size}, got {block_size}')
    if not 0 <= rank <= size:
        raise ValueError(f'rank must be in 0..{size}, got {rank}')
    if sweeps < 1:
        raise ValueError(f'sweeps must be positive, got {sweeps}')
    with torch.no_grad():
        target = dense('A', A)
        U, V = _start(target, rank, start)
        ones = torch.ones(block_size, block_size)
        mask = torch.kron(torch.eye(size // block_size), ones).bool()
        norm = torch.linalg.matrix_norm(target)
        diagonal = torch.where(mask, target - U @ V.mT, 0.0)
        before = torch.full_like(norm, torch.inf)
        for _ in range(sweeps):
            if rank:
                U, V = _low_rank(target - diagonal, rank)
            diagonal = torch.where(mask, target - U @ V.mT, 0.0)
            residual = torch.linalg.matrix_norm(diagonal + U @ V.mT - target)
            if not (before - residual > 1e-12 * norm).any():
                break
            before = residual
        residual = residual / torch.where(norm == 0, 1.0, norm)
        parts = (_blocks(diagonal, block_size), U, V, residual)
        dtype = real_dtype(A)
        blocks, U, V, residual = (x.to(A.device, dtype) for x in parts)
    return blocks, U, V, residual


def _start(
    A: Tensor, rank: int, start: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    shape = (*A.shape[:-1], rank)
    U, V = (A.new_zeros(shape),) * 2 if start is None else start
    for name, factor in (('U', U), ('V', V)):
        if factor.shape != shape:
            raise ValueError(
                f'start {name} must be {shape}, got {tuple(factor.shape)}'
            )
        check_finite(f'start {name}', factor)
    U, V = U.to(A), V.to(A)
    # from U V^T = 0 the sweeps may never leave a saddle
    nothing = (U @ V.mT == 0).all(-1).all(-1)[..., None, None]
    noise = _fixed_noise(A.shape[-1], A)
    root = torch.linalg.matrix_norm(A).sqrt()[..., None, None]
    U = torch.where(nothing, root * noise[:, :rank], U)
    return U, torch.where(nothing, root * noise.mT[:, :rank], V)


def _low_rank(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors, each with the root of the singular values."""
    left, values, right = torch.linalg.svd(A)
    root = values[..., None, :rank].sqrt()
    return left[..., :rank] * root, right.mT[..., :rank] * root


def _blocks(A: Tensor, block_size: int) -> Tensor:
    """Diagonal blocks, (..., N / b, b, b)."""
    split = torch.unflatten(A, -1, (-1, block_size))
    split = torch.unflatten(split, -3, (-1, block_size))  # (..., K, b, K, b)
    return split.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()


def _fixed_noise(size: int, like: Tensor) -> Tensor:
    """Fixed real Gaussian matrix of spectral norm 1, (size, size).

    It is the same on every machine and in every call, so that results can be
    repeated.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, dtype=torch.float64, generator=generator)
    norm: Tensor = torch.linalg.matrix_norm(noise, 2)
    return (noise / norm).to(like.dtype)
