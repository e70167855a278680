"""Penalties on eigenvalues near the unstable half plane."""

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_choice, real_part
from mmstabvim.stability.state.spectra import numerical_abscissa

REDUCTIONS = ('sum', 'mean')


def stability_penalty(
    eigenvalues: Tensor,
    eps: float = 0.01,
    reduction: str = 'sum',
    pairs: bool = False,
) -> Tensor:
    """Penalty on real parts: ``sum_i max(0, Re(lambda_i) - eps)``, or mean.

    For a matrix with simple eigenvalues the gradient is ``Re[X^-T diag(m)
    X^T]`` with m = 1 for the active ones, so its trace is their number. At
    ``Re(lambda) = eps`` it is 0.

    Args:
        eigenvalues (Tensor): Continuous-time, any shape, real or complex,
            1/step. NaN gives NaN.
        eps (float): Threshold, 1/step. A positive one tolerates slow growth,
            a negative one asks for a margin. Defaults to 0.01.
        reduction (str): ``'sum'`` or ``'mean'``. Defaults to ``'sum'``.
        pairs (bool): Each eigenvalue stands for a conjugate pair: the sum
            counts it twice. Defaults to False.

    Returns:
        Tensor: Scalar, >= 0, 1/step, float32 or wider.

    Raises:
        ValueError: If ``reduction`` is unknown.

    Example:
        >>> stability_penalty(torch.tensor([0.5, -1.0, 0.75]), eps=0.25)
        tensor(0.7500)
    """
    check_choice('reduction', reduction, REDUCTIONS)
    excess = torch.relu(real_part(eigenvalues) - eps)
    if reduction == 'mean':
        return excess.mean()
    return excess.sum() * (2 if pairs else 1)


def numerical_abscissa_penalty(
    A: Tensor, eps: float = 0.01, reduction: str = 'sum'
) -> Tensor:
    """Penalty on the numerical abscissa mu: ``max(0, mu(A) - eps)``.

    The numerical abscissa bounds every real part from above. Its gradient has
    a norm of at most 1, also where eigenvectors coincide. The penalty is
    stricter than stability: it is zero only if ``||exp(t A)|| <= exp(eps t)``
    for all t.

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

    Example:
        >>> A = torch.tensor([[-1.0, 4.0], [0.0, -1.0]])  # stable
        >>> numerical_abscissa_penalty(A, eps=0.0)
        tensor(1.)
    """
    check_choice('reduction', reduction, REDUCTIONS)
    excess = torch.relu(numerical_abscissa(A) - eps)
    return excess.mean() if reduction == 'mean' else excess.sum()
