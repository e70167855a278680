"""Penalties on eigenvalues near the unstable half plane."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.state.spectra import numerical_abscissa

REDUCTIONS = ('sum', 'mean')


class PenaltyCounts(NamedTuple):
    """How much of a penalty is active."""

    active: Tensor
    """Number of eigenvalues above the threshold, int64 scalar."""
    max_real: Tensor
    """Largest real part, scalar, 1/step."""


def stability_penalty(
    eigenvalues: Tensor,
    eps: float = 0.01,
    reduction: str = 'sum',
    pairs: bool = False,
) -> Tensor:
    """``sum_i max(0, Re(lambda_i) - eps)``, or the mean over i.

    For a matrix with simple eigenvalues the gradient is ``Re[X^-T diag(m)
    X^T]`` with m = 1 for the active ones, so its trace is their number. At
    ``Re(lambda) = eps`` it is 0.

    Args:
        eigenvalues (Tensor): Continuous-time, any shape, real or complex,
            1/step. NaN gives NaN.
        eps (float): Threshold, 1/step: above 0 it tolerates slow growth, a
            negative one asks for a margin. Defaults to 0.01.
        reduction (str): ``'sum'`` or ``'mean'``. Defaults to ``'sum'``.
        pairs (bool): Each eigenvalue stands for a conjugate pair: the sum
            counts it twice. Defaults to False.

    Returns:
        Tensor: Scalar, >= 0, 1/step, float32 or wider.

    Raises:
        ValueError: If ``reduction`` is unknown.
    """
    check_choice('reduction', reduction, REDUCTIONS)
    excess = torch.relu(_real_part(eigenvalues) - eps)
    if reduction == 'mean':
        return excess.mean()
    return excess.sum() * (2 if pairs else 1)


def penalty_counts(
    eigenvalues: Tensor, eps: float = 0.01, pairs: bool = False
) -> PenaltyCounts:
    """Number of active eigenvalues and the largest real part.

    Args:
        eigenvalues (Tensor): As in :func:`stability_penalty`, not empty.
        eps (float): Threshold, 1/step. Defaults to 0.01.
        pairs (bool): Count each eigenvalue twice. Defaults to False.

    Returns:
        PenaltyCounts: Tensors on the device, without gradient.
    """
    real = _real_part(eigenvalues.detach())
    active = (real > eps).sum() * (2 if pairs else 1)
    return PenaltyCounts(active, real.amax())


def numerical_abscissa_penalty(
    A: Tensor, eps: float = 0.01, reduction: str = 'sum'
) -> Tensor:
    """``max(0, mu(A) - eps)`` summed or averaged over the matrices.

    The numerical abscissa mu bounds every real part from above and has a
    gradient of norm at most 1, also where eigenvectors coincide. Stricter
    than stability: zero only if ``||exp(t A)|| <= exp(eps t)`` for all t.

    Args:
        A (Tensor): (..., N, N), real or complex, 1/step.
        eps (float): Threshold, 1/step. Defaults to 0.01.
        reduction (str): ``'sum'`` or ``'mean'`` over the matrices. Defaults
            to ``'sum'``.

    Returns:
        Tensor: Scalar, >= 0, 1/step, float32 or wider.

    Raises:
        ValueError: If ``reduction`` is unknown, or ``A`` not square or not
            finite.

    Source: Trefethen and Embree, Spectra and Pseudospectra, Sec. 17.
    """
    check_choice('reduction', reduction, REDUCTIONS)
    excess = torch.relu(numerical_abscissa(A) - eps)
    return excess.mean() if reduction == 'mean' else excess.sum()


def _real_part(eigenvalues: Tensor) -> Tensor:
    """Real parts in float32 or wider."""
    real = eigenvalues.real if eigenvalues.is_complex() else eigenvalues
    return real.to(torch.promote_types(real.dtype, torch.float32))
