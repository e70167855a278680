"""From a continuous-time state matrix to one step of the recurrence."""

import torch
from torch import Tensor

B_DISCS = ('euler', 'zoh')


def phi1(x: Tensor) -> Tensor:
    """``(exp(x) - 1) / x``, finite and differentiable at 0.

    Args:
        x (Tensor): Real or complex, any shape, dimensionless.

    Returns:
        Tensor: As ``x``; relative error below 1e-7 in float32. The naive
        quotient is wrong by 100 % at x = -1e-8.
    """
    small = x.abs() < 1e-3
    # the second where keeps 0 / 0 out of the gradient
    safe = torch.where(small, torch.ones_like(x), x)
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4))
    return torch.where(small, series, torch.expm1(safe) / safe)


def phi1_derivative(x: Tensor) -> Tensor:
    """Derivative of :func:`phi1`: ``(exp(x) - phi1(x)) / x``.

    Args:
        x (Tensor): Real or complex, any shape, dimensionless.

    Returns:
        Tensor: As ``x``; the power series for ``|x| < 0.1``, where the
        quotient cancels.
    """
    small = x.abs() < 0.1
    safe = torch.where(small, torch.ones_like(x), x)
    series = torch.full_like(x, 1 / 5760)
    for divisor in (840, 144, 30, 8, 3, 2):
        series = series * x + 1 / divisor
    return torch.where(small, series, (torch.exp(safe) - phi1(safe)) / safe)
