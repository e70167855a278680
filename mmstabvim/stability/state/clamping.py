"""Clamping of eigenvalues: diagonal, dense, and block plus low rank."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmstabvim.stability.inputs import (
    add_to_diagonal,
    check_choice,
    check_finite,
    check_square,
    dense,
    perturbation,
    real_dtype,
)
from mmstabvim.stability.state.eigenbasis import (
    condition_number,
    eigenvalue_gap,
)
from mmstabvim.stability.state.spectra import spectral_abscissa

METHODS = ('eig', 'schur', 'shift')


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def straight_through(x: Tensor, clamped: Tensor) -> Tensor:
    """``clamped`` going forward, the identity of ``x`` going backward.

    A clamp passes no gradient to what it clamps, so a parameter stuck there
    never returns; with this it can.

    Args:
        x (Tensor): What was clamped, any shape.
        clamped (Tensor): As ``x``; its own gradient is not used.

    Returns:
        Tensor: ``clamped``, bitwise.

    Raises:
        ValueError: If shape or dtype differ.

    Source: arXiv:1308.3432, Sec. 4 (straight-through estimator).
    """
    if x.shape != clamped.shape or x.dtype != clamped.dtype:
        raise ValueError(
            f'clamped must be as x, {tuple(x.shape)} {x.dtype}, got '
            f'{tuple(clamped.shape)} {clamped.dtype}'
        )
    return _StraightThrough.apply(x, clamped.detach())


def clamp_real_part(
    eigenvalues: Tensor,
    eps: float = 0.01,
    lambda_max: float | None = None,
    ste: bool = False,
) -> Tensor:
    """Bound the real parts: ``-lambda_max <= Re <= -eps``.

    ``Re' = min(Re, -eps)``, then ``max(Re', -lambda_max)``; imaginary parts
    and values inside stay bitwise as they are. A bound that the dtype does
    not have is rounded inwards.

    Args:
        eigenvalues (Tensor): Continuous-time, any shape, real or complex,
            1/step.
        eps (float): Least decay rate, >= 0, 1/step. Defaults to 0.01.
        lambda_max (float, optional): Largest decay rate, >= ``eps``.
        ste (bool): Pass the gradient of clamped values as if they were not
            (:func:`straight_through`). Defaults to False: they get none.

    Returns:
        Tensor: As ``eigenvalues``.

    Raises:
        ValueError: If a value is not finite, ``eps`` negative, or
            ``lambda_max`` below ``eps``.
    """
    _check_bounds(eps, lambda_max)
    check_finite('eigenvalues', eigenvalues)
    dtype = eigenvalues.dtype.to_real()
    high = _within(-eps, dtype, -math.inf)
    low = None
    if lambda_max is not None:
        low = min(_within(-lambda_max, dtype, math.inf), high)
    if eigenvalues.is_complex():
        real = eigenvalues.real.clamp(low, high)
        clamped = torch.complex(real, eigenvalues.imag)
    else:
        clamped = eigenvalues.clamp(low, high)
    return straight_through(eigenvalues, clamped) if ste else clamped


def _within(bound: float, dtype: torch.dtype, towards: float) -> float:
    """The number of a dtype next to a bound, on one side of it or on it."""
    rounded = torch.tensor(bound, dtype=dtype)
    if (float(rounded) - bound) * towards < 0:
        rounded = torch.nextafter(rounded, torch.tensor(towards, dtype=dtype))
    return float(rounded)


def continuous_margin(margin: float, delta_ref: float) -> float:
    """Decay rate ``-ln(1 - margin) / delta_ref`` of a discrete margin.

    Args:
        margin (float): Distance of ``|exp(delta_ref lambda)|`` to 1, in
            [0, 1).
        delta_ref (float): Reference step, > 0.

    Returns:
        float: The ``eps`` of :func:`clamp_real_part`, >= 0, 1/step.

    Raises:
        ValueError: If one of them is out of its range.
    """
    _check_margin(margin)
    if not (delta_ref > 0 and math.isfinite(delta_ref)):
        raise ValueError(f'delta_ref must be positive, got {delta_ref}')
    return -math.log1p(-margin) / delta_ref


def clamp_discrete(
    eigenvalues: Tensor,
    margin: float = 1e-3,
    delta_ref: float = 0.1,
    lambda_max: float | None = None,
    ste: bool = False,
) -> Tensor:
    """Bound ``|exp(delta_ref lambda)| <= 1 - margin``, keeping the phase.

    The discrete rule on continuous eigenvalues: ``Re' = min(Re, ln(1 -
    margin) / delta_ref)``. Tokens with a step below ``delta_ref`` may forget
    less.

    Args:
        eigenvalues (Tensor): Continuous-time, any shape, real or complex,
            1/step.
        margin (float): In [0, 1). Defaults to 1e-3.
        delta_ref (float): Reference step, > 0. Defaults to 0.1.
        lambda_max (float, optional): Largest decay rate, 1/step.
        ste (bool): As in :func:`clamp_real_part`. Defaults to False.

    Returns:
        Tensor: As ``eigenvalues``.

    Raises:
        ValueError: As :func:`clamp_real_part`, or if ``margin`` or
            ``delta_ref`` is out of its range.
    """
    eps = continuous_margin(margin, delta_ref)
    return clamp_real_part(eigenvalues, eps, lambda_max, ste)


def clamp_modulus(
    eigenvalues: Tensor,
    margin: float = 1e-3,
    slack: float = 1e-6,
    ste: bool = False,
) -> Tensor:
    """Bound the modulus of discrete eigenvalues, keeping the phase.

    ``mu' = mu min(1, (1 - margin) / |mu|)`` for ``mu = exp(delta lambda)``.
    On continuous eigenvalues use :func:`clamp_discrete`.

    Args:
        eigenvalues (Tensor): Discrete-time, any shape, real or complex,
            dimensionless.
        margin (float): In [0, 1). Defaults to 1e-3.
        slack (float): Relative excess that is let through, so that a second
            application changes nothing. Defaults to 1e-6.
        ste (bool): As in :func:`clamp_real_part`. Defaults to False.

    Returns:
        Tensor: As ``eigenvalues``.

    Raises:
        ValueError: If a value is not finite or ``margin`` out of its range.
    """
    _check_margin(margin)
    check_finite('eigenvalues', eigenvalues)
    modulus = eigenvalues.abs()
    within = modulus <= (1 - margin) * (1 + slack)
    factor = (1 - margin) / torch.where(within, 1.0, modulus)
    clamped = torch.where(within, eigenvalues, eigenvalues * factor)
    return straight_through(eigenvalues, clamped) if ste else clamped


def project_to_disc(
    eigenvalues: Tensor,
    eps: float,
    rho_max: float,
    slack: float = 1e-6,
    ste: bool = False,
) -> Tensor:
    """Nearest point with ``Re <= -eps`` and ``|lambda| <= rho_max``.

    Clamping after spectral normalization may leave the disc, normalization
    after clamping may leave the half plane; this is the exact projection on
    both: ``min(Re, -eps)`` if that is in the disc, else the radial projection
    if it is in the half plane, else the corner.

    Args:
        eigenvalues (Tensor): Continuous-time, any shape, real or complex,
            1/step.
        eps (float): Least decay rate, in [0, rho_max), 1/step.
        rho_max (float): Largest modulus, 1/step.
        slack (float): Relative excess of the modulus that is let through, so
            that a second application changes nothing. Defaults to 1e-6.
        ste (bool): As in :func:`clamp_real_part`. Defaults to False.

    Returns:
        Tensor: As ``eigenvalues``.

    Raises:
        ValueError: If a value is not finite, or not ``0 <= eps < rho_max``.
    """
    if not 0 <= eps < rho_max < math.inf:
        raise ValueError(
            f'want 0 <= eps < rho_max, got eps={eps}, rho_max={rho_max}'
        )
    check_finite('eigenvalues', eigenvalues)
    if not eigenvalues.is_complex():
        clamped = eigenvalues.clamp(-rho_max, -eps)
        return straight_through(eigenvalues, clamped) if ste else clamped
    half = torch.complex(eigenvalues.real.clamp(max=-eps), eigenvalues.imag)
    within = half.abs() <= rho_max * (1 + slack)
    modulus = torch.where(within, 1.0, eigenvalues.abs())
    # where it is used |lambda| > 0: eps < rho_max puts lambda near 0 within
    radial = eigenvalues * (rho_max / modulus)
    height = math.sqrt(rho_max**2 - eps**2)
    corner = torch.complex(
        torch.full_like(half.real, -eps), half.imag.sign() * height
    )
    outside = torch.where(radial.real <= -eps, radial, corner)
    clamped = torch.where(within, half, outside)
    return straight_through(eigenvalues, clamped) if ste else clamped


def clamp_matrix(
    A: Tensor,
    eps: float = 0.01,
    lambda_max: float | None = None,
    method: str = 'eig',
    kappa_max: float = 1e3,
    slack: float = 1e-6,
    ste: bool = False,
) -> Tensor:
    """Bound the real parts of the eigenvalues of real matrices.

    ``'eig'`` clamps in the eigenbasis, ``Re[X diag(lambda') X^-1]``, and
    takes ``'schur'`` for a matrix whose basis is ill-conditioned or whose
    eigenvalues coincide, where it would be discontinuous. ``'schur'`` clamps
    the diagonal of the real Schur form, so ``||A' - A||_F = ||lambda' -
    lambda||``; it works for every matrix, in a loop over the violating ones.
    ``'shift'`` subtracts ``relu(alpha + eps)`` from the whole diagonal: all
    eigenvalues move, the off-diagonal part stays. Only violating matrices
    change; the rest is bitwise as it was.

    Gradients: ``'eig'`` and ``'shift'`` by autograd, what went through
    ``'schur'`` straight through (the identity).

    Args:
        A (Tensor): (..., N, N), real, 1/step.
        eps (float): Least decay rate, >= 0, 1/step. Defaults to 0.01.
        lambda_max (float, optional): Largest decay rate, >= ``eps``; not for
            ``'shift'``, which cannot bound from below.
        method (str): ``'eig'``, ``'schur'`` or ``'shift'``. Defaults to
            ``'eig'``.
        kappa_max (float): Condition number of the eigenvectors up to which
            ``'eig'`` is used. Defaults to 1e3.
        slack (float): Excess of a real part that is let through, relative to
            the larger of ``eps`` and ``||A||_F``: rounding moves eigenvalues
            by that much. Defaults to 1e-6.
        ste (bool): Pass all gradients straight through. Defaults to False.

    Returns:
        Tensor: As ``A``, at least float32; computed in float64. Eigenvalues
        of a matrix that is nearly defective are uncertain by more than the
        slack; follow with ``'shift'`` where the bound must hold.

    Raises:
        ValueError: If ``A`` is not square, not finite or complex, a bound is
            out of its range, or ``method`` unknown.
    """
    check_choice('method', method, METHODS)
    _check_bounds(eps, lambda_max)
    if method == 'shift' and lambda_max is not None:
        raise ValueError(
            "lambda_max needs method 'eig' or 'schur': a shift cannot bound "
            'the real parts from below'
        )
    if A.is_complex():
        raise ValueError(f'A must be real, got {A.dtype}')
    matrix = dense('A', A)
    if method == 'shift':
        clamped = _clamp_by_shift(matrix, eps, slack)
    else:
        clamped = _clamp_violating(
            matrix, eps, lambda_max, slack, kappa_max if method == 'eig' else 0
        )
    clamped = clamped.to(A.device, real_dtype(A))
    return straight_through(A.to(clamped.dtype), clamped) if ste else clamped


def fit_block_low_rank(
    A: Tensor,
    block_size: int,
    rank: int,
    sweeps: int = 100,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit ``blkdiag(blocks) + U V^T`` to dense matrices by least squares.

    Alternates the best blocks for the low-rank part and the best low-rank
    part for the blocks (a truncated singular value decomposition); no sweep
    makes the fit worse. In general a residual is left, so eigenvalues are not
    those of ``A``. Without gradient.

    Args:
        A (Tensor): (..., N, N), real.
        block_size (int): Size b of a block, dividing N.
        rank (int): Rank r of ``U V^T``, 0 to N.
        sweeps (int): Most alternations, > 0; fewer where they no longer
            help. Defaults to 100.
        start (tuple[Tensor, Tensor], optional): U and V to start from,
            (..., N, r) each; a fixed start where absent or ``U V^T = 0``.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor]: blocks (..., N / b, b, b), U
        and V (..., N, r) with singular values split evenly, and the relative
        residual ``||blkdiag + U V^T - A||_F / ||A||_F`` (...), 0 for A = 0.
        At least float32, computed in float64.

    Raises:
        ValueError: If ``A`` is not square, not finite or complex, or a size
            does not fit.
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
        mask = torch.block_diag(
            *torch.ones(size // block_size, block_size, block_size)
        ).bool()
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


def _check_bounds(eps: float, lambda_max: float | None) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f'eps must be >= 0 and finite, got {eps}')
    if lambda_max is not None and not eps <= lambda_max:
        raise ValueError(
            f'lambda_max must be at least eps={eps}, got {lambda_max}'
        )


def _check_margin(margin: float) -> None:
    if not 0 <= margin < 1:
        raise ValueError(f'margin must be in [0, 1), got {margin}')


def _tolerance(A: Tensor, eps: float, slack: float) -> Tensor:
    """Excess of a real part that is not worth a change, (...)."""
    return slack * torch.linalg.matrix_norm(A.detach()).clamp(min=eps)


def _clamp_by_shift(A: Tensor, eps: float, slack: float) -> Tensor:
    excess = spectral_abscissa(A) + eps
    within = excess <= _tolerance(A, eps, slack)
    shifted = add_to_diagonal(A, -excess)
    return torch.where(within[..., None, None], A, shifted)


def _clamp_violating(
    A: Tensor,
    eps: float,
    lambda_max: float | None,
    slack: float,
    kappa_max: float,
) -> Tensor:
    """``'eig'`` up to ``kappa_max``, ``'schur'`` above, where A violates."""
    flat = A.reshape(-1, *A.shape[-2:])
    low = None if lambda_max is None else -lambda_max

    def change(real: Tensor) -> Tensor:
        return real.clamp(low, -eps) - real

    with torch.no_grad():
        real = torch.linalg.eigvals(flat).real
        allowed = _tolerance(flat, eps, slack)
        index = (change(real).abs().amax(-1) > allowed).nonzero()[:, 0]
        usable = _usable_basis(flat[index], change, kappa_max)
    out = flat.clone()
    by_eig, by_schur = index[usable], index[~usable]
    if len(by_eig):
        part = flat[by_eig]
        values, vectors = torch.linalg.eig(part)
        moved = part + _eig_change(values, vectors, change).real
        out = out.index_put((by_eig,), moved)
    if len(by_schur):
        part = flat[by_schur]
        moved = part.detach() + _schur_change(part.detach(), change)
        out = out.index_put((by_schur,), straight_through(part, moved))
    return out.reshape(A.shape)


def _usable_basis(
    A: Tensor, change: Callable[[Tensor], Tensor], kappa_max: float
) -> Tensor:
    """Where the change in the eigenbasis is real and well-conditioned, (M,).

    Nearly equal eigenvalues count as bad too: their gradient is not finite.
    """
    if not (len(A) and kappa_max):
        return A.new_zeros(len(A), dtype=torch.bool)
    values, vectors = torch.linalg.eig(A)
    condition = condition_number(vectors)
    norm = torch.linalg.matrix_norm(A)
    good = (condition <= kappa_max) & (eigenvalue_gap(values) > 1e-10 * norm)
    # a singular basis has no change to look at
    vectors = torch.where(good[:, None, None], vectors, torch.eye(A.shape[-1]))
    unreal = _eig_change(values, vectors, change).imag
    unreal = torch.linalg.matrix_norm(unreal)
    return good & (unreal <= 1e-6 * condition * norm)


def _eig_change(
    values: Tensor, vectors: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """``X diag(change(Re lambda)) X^-1``, complex."""
    scaled = vectors * change(values.real)[:, None]
    return torch.linalg.solve(vectors, scaled, left=False)


def _schur_change(A: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``Q diag(change(Re lambda)) Q^T`` of the real Schur form, (M, N, N)."""
    from scipy.linalg import schur

    forms = [schur(matrix, output='real') for matrix in A.numpy()]
    # LAPACK makes both diagonal entries of a 2 x 2 block the real part
    real = np.stack([np.diagonal(form) for form, _ in forms])
    vectors = torch.from_numpy(np.stack([q for _, q in forms]))
    scaled = vectors * change(torch.from_numpy(real))[:, None]
    return scaled @ vectors.mT


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
    noise = perturbation(A.shape[-1], A)
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
    split = A.unflatten(-1, (-1, block_size))
    split = split.unflatten(-3, (-1, block_size))  # (..., K, b, K, b)
    return split.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()
