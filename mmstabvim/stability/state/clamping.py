"""Clamping of eigenvalues, of diagonal and of dense matrices."""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mmstabvim.stability.inputs import (
    add_to_diagonal,
    check_choice,
    check_finite,
    dense,
    real_dtype,
)
from mmstabvim.stability.state.eigenbasis import (
    condition_number,
    eigenvalue_gap,
)
from mmstabvim.stability.state.normalization import abscissa_shift
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
    """Return ``clamped``, with the gradient of the identity of ``x``.

    A clamp passes no gradient to clamped values, so a parameter at its bound
    never returns. With the straight-through gradient it can.

    Args:
        x (Tensor): Values before the clamp, any shape.
        clamped (Tensor): Values after it, same shape and dtype; its own
            gradient is not used.

    Returns:
        Tensor: ``clamped``, bitwise.

    Raises:
        ValueError: If shape or dtype differ.

    Source: arXiv:1308.3432, Sec. 4 (straight-through estimator).

    Example:
        >>> x = torch.tensor([2.0, -1.0], requires_grad=True)
        >>> straight_through(x, x.clamp(max=0)).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    if x.shape != clamped.shape or x.dtype != clamped.dtype:
        raise ValueError(
            f'clamped must be as x, {tuple(x.shape)} {x.dtype}, got '
            f'{tuple(clamped.shape)} {clamped.dtype}'
        )
    through = cast(Any, _StraightThrough).apply(x, clamped.detach())
    return cast(Tensor, through)


def clamp_real_part(
    eigenvalues: Tensor,
    eps: float = 0.01,
    lambda_max: float | None = None,
    ste: bool = False,
) -> Tensor:
    """Bound the real parts: ``-lambda_max <= Re <= -eps``.

    ``Re' = min(Re, -eps)``, then ``max(Re', -lambda_max)``; imaginary parts
    and values inside stay bitwise as they are. A bound that the dtype cannot
    represent is rounded inwards.

    Args:
        eigenvalues (Tensor): Continuous-time, any shape, real or complex,
            1/step.
        eps (float): Least decay rate, >= 0, 1/step. Defaults to 0.01.
        lambda_max (float, optional): Largest decay rate, >= ``eps``.
        ste (bool): Give clamped values the straight-through gradient
            (:func:`straight_through`). Defaults to False: they get none.

    Returns:
        Tensor: Clamped eigenvalues, same shape and dtype.

    Raises:
        ValueError: If a value is not finite, ``eps`` negative, or
            ``lambda_max`` below ``eps``.

    Example:
        >>> clamp_real_part(torch.tensor([-5.0, -0.5, 3.0]), 0.25, 2.0)
        tensor([-2.0000, -0.5000, -0.2500])
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
    """Round a bound to a dtype, towards one side."""
    rounded = torch.tensor(bound, dtype=dtype)
    if (float(rounded) - bound) * towards < 0:
        rounded = torch.nextafter(rounded, torch.tensor(towards, dtype=dtype))
    return float(rounded)


def continuous_margin(margin: float, delta_ref: float) -> float:
    """Convert a discrete margin into a decay rate.

    The rate is ``-ln(1 - margin) / delta_ref``: eigenvalues with a real part
    of at most minus this rate give ``|exp(delta_ref lambda)| <= 1 - margin``.
    Tokens with a step below ``delta_ref`` may forget less.

    Args:
        margin (float): Distance of ``|exp(delta_ref lambda)|`` to 1, in
            [0, 1).
        delta_ref (float): Reference step, > 0.

    Returns:
        float: The ``eps`` of :func:`clamp_real_part`, >= 0, 1/step.

    Raises:
        ValueError: If one of them is out of its range.

    Example:
        >>> round(continuous_margin(0.01, 0.1), 4)
        0.1005
    """
    if not 0 <= margin < 1:
        raise ValueError(f'margin must be in [0, 1), got {margin}')
    if not (delta_ref > 0 and math.isfinite(delta_ref)):
        raise ValueError(f'delta_ref must be positive, got {delta_ref}')
    return -math.log1p(-margin) / delta_ref


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

    Only violating matrices change; the rest stays bitwise as it was.

    - ``'eig'`` clamps in the eigenbasis, ``Re[X diag(lambda') X^-1]``. It
      uses ``'schur'`` for a matrix with an ill-conditioned basis or with
      equal eigenvalues, where it would be discontinuous. Its gradient comes
      from autograd.
    - ``'schur'`` clamps the diagonal of the real Schur form, so ``||A' -
      A||_F = ||lambda' - lambda||``. It works for every matrix, in a loop
      over the violating ones. Its gradient is straight through (the
      identity).
    - ``'shift'`` subtracts ``relu(alpha + eps)`` from the whole diagonal: all
      eigenvalues move, the off-diagonal part stays. Its gradient comes from
      autograd.

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
        ste (bool): Give every entry the straight-through gradient. Defaults
            to False.

    Returns:
        Tensor: Clamped matrices, shape of ``A``, at least float32; computed
        in float64. Eigenvalues of a nearly defective matrix are uncertain by
        more than the slack; follow with ``'shift'`` where the bound must
        hold.

    Raises:
        ValueError: If ``A`` is not square, not finite or complex, a bound is
            out of its range, or ``method`` unknown.

    Example:
        >>> clamp_matrix(torch.tensor([[1.0, 2.0], [-2.0, 1.0]]), 0.5)
        tensor([[-0.5000,  2.0000],
                [-2.0000, -0.5000]])
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


def _check_bounds(eps: float, lambda_max: float | None) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f'eps must be >= 0 and finite, got {eps}')
    if lambda_max is not None and not eps <= lambda_max:
        raise ValueError(
            f'lambda_max must be at least eps={eps}, got {lambda_max}'
        )


def _tolerance(A: Tensor, eps: float, slack: float) -> Tensor:
    """Excess of a real part that is let through, (...)."""
    norm: Tensor = torch.linalg.matrix_norm(A.detach())
    return slack * norm.clamp(min=eps)


def _clamp_by_shift(A: Tensor, eps: float, slack: float) -> Tensor:
    tolerance = _tolerance(A, eps, slack)
    shift = abscissa_shift(spectral_abscissa(A), -eps, tolerance)
    return add_to_diagonal(A, -shift)


def _clamp_violating(
    A: Tensor,
    eps: float,
    lambda_max: float | None,
    slack: float,
    kappa_max: float,
) -> Tensor:
    """Clamp violating matrices: ``'eig'`` up to ``kappa_max``, else Schur."""
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
    """Find matrices whose eigenbasis gives a real, accurate change, (M,).

    Nearly equal eigenvalues are excluded: their gradient is not finite.
    """
    if not (len(A) and kappa_max):
        return A.new_zeros(len(A), dtype=torch.bool)
    values, vectors = torch.linalg.eig(A)
    condition = condition_number(vectors)
    norm: Tensor = torch.linalg.matrix_norm(A)
    good = (condition <= kappa_max) & (eigenvalue_gap(values) > 1e-10 * norm)
    # a singular basis has no change to look at
    vectors = torch.where(good[:, None, None], vectors, torch.eye(A.shape[-1]))
    imaginary = _eig_change(values, vectors, change).imag
    unreal: Tensor = torch.linalg.matrix_norm(imaginary)
    return good & (unreal <= 1e-6 * condition * norm)


def _eig_change(
    values: Tensor, vectors: Tensor, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """``X diag(change(Re lambda)) X^-1``, complex."""
    scaled = vectors * change(values.real)[:, None]
    changed: Tensor = torch.linalg.solve(vectors, scaled, left=False)
    return changed


def _schur_change(A: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``Q diag(change(Re lambda)) Q^T`` of the real Schur form, (M, N, N)."""
    from scipy.linalg import schur

    forms = [schur(matrix, output='real') for matrix in A.numpy()]
    # LAPACK makes both diagonal entries of a 2 x 2 block the real part
    real = np.stack([np.diagonal(form) for form, _ in forms])
    vectors = torch.from_numpy(np.stack([q for _, q in forms]))
    scaled = vectors * change(torch.from_numpy(real))[:, None]
    return scaled @ vectors.mT
