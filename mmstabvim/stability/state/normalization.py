"""Scales and shifts of spectral normalization."""

import math

import torch
from torch import Tensor


def _check_rho_max(
    rho_max: float,
    discrete: bool = False,
    delta_ref: float | None = None,
) -> None:
    """Check the bound of A, or the discrete one of ``exp(delta_ref A)``."""
    if not (rho_max > 0 and math.isfinite(rho_max)):
        raise ValueError(f'rho_max must be positive, got {rho_max}')
    if not discrete:
        return
    if rho_max > 1:
        raise ValueError(
            "rho_max must be in (0, 1] where domain='discrete', got "
            f'{rho_max}: a radius above 1 lets the state grow'
        )
    if rho_max < 1 and delta_ref is None:
        raise ValueError(
            "domain='discrete' with rho_max < 1 needs delta_ref, the step "
            f'that rho_max={rho_max} refers to'
        )
    if delta_ref is not None and not (
        delta_ref > 0 and math.isfinite(delta_ref)
    ):
        raise ValueError(f'delta_ref must be positive, got {delta_ref}')


def radius_scale(
    radius: Tensor,
    rho_max: float | Tensor,
    slack: float = 1e-6,
    detach: bool = False,
) -> Tensor:
    """Divisor ``c = max(1, radius / rho_max)`` of spectral normalization.

    ``A / c`` then has a spectral radius of at most ``rho_max``. Within the
    slack c is exactly 1, so that a second application does not change the
    matrix again by rounding.

    Args:
        radius (Tensor): Spectral radius, any shape, >= 0. NaN gives NaN.
        rho_max (float or Tensor): Bound, > 0, unit of ``radius``; a tensor
            broadcasts against it.
        slack (float): Relative excess that is let through. Defaults to 1e-6.
        detach (bool): Stop the gradient through c. Defaults to False.

    Returns:
        Tensor: Shape of ``radius``, >= 1, dimensionless.

    Raises:
        ValueError: If ``rho_max`` is not positive.

    Source: after arXiv:1802.05957, Eq. 8, with the eigenvalue radius and a
    bound instead of the singular value and equality.

    Example:
        >>> radius_scale(torch.tensor([0.5, 3.0]), 1.5)
        tensor([1., 2.])
    """
    if isinstance(rho_max, Tensor):
        if not bool((rho_max > 0).all()):
            raise ValueError(f'rho_max must be positive, got {rho_max}')
    else:
        _check_rho_max(rho_max)
    if detach:
        radius = radius.detach()
    within = radius <= rho_max * (1 + slack)
    return torch.where(within, 1.0, radius / rho_max)


def log_radius_scale(
    log_radius: Tensor,
    rho_max: float | Tensor,
    slack: float = 1e-6,
    detach: bool = False,
) -> Tensor:
    """Logarithm of :func:`radius_scale`, from the logarithm of the radius.

    It serves parameters that are logarithms. Nothing overflows, and
    subtracting the result in float64 keeps a second application bitwise the
    identity.

    Args:
        log_radius (Tensor): ``ln(radius)``, any shape.
        rho_max (float or Tensor): Bound of the radius, > 0.
        slack (float): Relative excess of the radius that is let through.
            Defaults to 1e-6.
        detach (bool): Stop the gradient. Defaults to False.

    Returns:
        Tensor: Shape of ``log_radius``, float64, >= 0.

    Raises:
        ValueError: If ``rho_max`` is not positive.

    Example:
        >>> log_radius_scale(torch.tensor([-1.0, 100.0]), 1.0).tolist()
        [0.0, 100.0]
    """
    if isinstance(rho_max, Tensor):
        if not bool((rho_max > 0).all()):
            raise ValueError(f'rho_max must be positive, got {rho_max}')
        log_bound = rho_max.double().log()
    else:
        _check_rho_max(rho_max)
        log_bound = torch.tensor(math.log(rho_max), dtype=torch.float64)
    if detach:
        log_radius = log_radius.detach()
    # a log of 80 is stored to 4e-6 only
    spacing = torch.finfo(log_radius.dtype).eps
    excess = log_radius.double() - log_bound.to(log_radius.device)
    tolerance = slack + spacing * log_bound.abs().to(log_radius.device)
    return torch.where(excess <= tolerance, 0.0, excess)


def abscissa_shift(
    abscissa: Tensor, limit: float, tolerance: float | Tensor = 0.0
) -> Tensor:
    """Shift s that brings the spectral abscissa of ``A - s I`` to a limit.

    Args:
        abscissa (Tensor): Spectral abscissa of A, any shape, 1/step. NaN
            gives NaN.
        limit (float): Largest abscissa allowed, 1/step.
        tolerance (float or Tensor): Excess that is let through, so that a
            second application does not shift again by rounding; a tensor
            broadcasts against ``abscissa``. Defaults to 0.0.

    Returns:
        Tensor: Shape of ``abscissa``, >= 0, 1/step; 0 where the limit holds.

    Example:
        >>> abscissa_shift(torch.tensor([-1.0, 0.5]), limit=-0.25)
        tensor([0.0000, 0.7500])
    """
    excess = abscissa - limit
    return torch.where(excess <= tolerance, 0.0, excess)


def discrete_shift(
    abscissa: Tensor,
    rho_max: float = 1.0,
    delta_ref: float | None = None,
    slack: float = 1e-6,
    scale: Tensor | None = None,
    detach: bool = False,
) -> Tensor:
    """Shift that bounds the spectral radius of ``exp(delta_ref A)``.

    Dividing ``exp(delta A)`` by ``exp(s)`` is ``A - (s / delta) I``, so the
    discrete normalization is ``A - relu(alpha - ln(rho_max) / delta_ref) I``.
    With ``rho_max = 1`` the bound holds for every step size at once. Below 1
    the radius of a token is at most ``rho_max ** (delta / delta_ref)``.

    Args:
        abscissa (Tensor): Spectral abscissa alpha of A, any shape, 1/step.
            NaN gives NaN.
        rho_max (float): Bound, in (0, 1]. Defaults to 1.0.
        delta_ref (float, optional): Reference step, > 0; needed if ``rho_max
            < 1``.
        slack (float): Excess that is let through, relative to the largest of
            1, the target and ``scale``, so that a second application does
            not shift again by rounding. Defaults to 1e-6.
        scale (Tensor, optional): Size of the entries of A, broadcast against
            ``abscissa``: float32 entries of 16 are stored to 1e-6 only.
        detach (bool): Stop the gradient. Defaults to False.

    Returns:
        Tensor: Shape of ``abscissa``, >= 0, 1/step.

    Raises:
        ValueError: If ``rho_max`` is not in (0, 1], or ``delta_ref`` is
            missing or not positive.

    Example:
        >>> discrete_shift(torch.tensor([-1.0, 0.5])).tolist()
        [0.0, 0.5]
    """
    _check_rho_max(rho_max, discrete=True, delta_ref=delta_ref)
    target = 0.0
    if delta_ref is not None and rho_max < 1:
        target = math.log(rho_max) / delta_ref
    if detach:
        abscissa = abscissa.detach()
    tolerance: float | Tensor = slack * max(1.0, abs(target))
    if scale is not None:
        tolerance = (slack * scale).to(abscissa.dtype).clamp(min=tolerance)
    return abscissa_shift(abscissa, target, tolerance)
