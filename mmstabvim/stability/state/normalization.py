"""How far a state matrix is scaled or shifted by spectral normalization."""

import math

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_choice

DOMAINS = ('continuous', 'discrete')


def check_rho_max(
    rho_max: float,
    domain: str = 'continuous',
    delta_ref: float | None = None,
) -> None:
    """Check the bound of spectral normalization.

    Args:
        rho_max (float): Bound of the spectral radius: of A, > 0, in
            ``domain='continuous'``; of exp(delta_ref A), in (0, 1], in
            ``'discrete'``.
        domain (str): ``'continuous'`` or ``'discrete'``. Defaults to
            ``'continuous'``.
        delta_ref (float, optional): Step that a discrete bound below 1 refers
            to, > 0.

    Raises:
        ValueError: If one of them is out of its range.
    """
    check_choice('domain', domain, DOMAINS)
    if not (rho_max > 0 and math.isfinite(rho_max)):
        raise ValueError(f'rho_max must be positive, got {rho_max}')
    if domain == 'continuous':
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
    slack c is exactly 1, so that rounding does not make a second application
    change the matrix again.

    Args:
        radius (Tensor): Spectral radius, any shape, >= 0. NaN gives NaN.
        rho_max (float or Tensor): Bound, > 0, unit of ``radius``; a tensor
            broadcasts against it.
        slack (float): Relative excess that is let through. Defaults to 1e-6.
        detach (bool): Stop the gradient through c. Defaults to False.

    Returns:
        Tensor: As ``radius``, >= 1, dimensionless.

    Raises:
        ValueError: If ``rho_max`` is not positive.

    Source: after arXiv:1802.05957, Eq. 8, with the eigenvalue radius and a
    bound instead of the singular value and equality.
    """
    if isinstance(rho_max, Tensor):
        if not bool((rho_max > 0).all()):
            raise ValueError(f'rho_max must be positive, got {rho_max}')
    else:
        check_rho_max(rho_max)
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

    For parameters that are logarithms: nothing overflows, and subtracting
    the result in float64 keeps a second application bitwise the identity.

    Args:
        log_radius (Tensor): ``ln(radius)``, any shape.
        rho_max (float or Tensor): Bound of the radius, > 0.
        slack (float): Relative excess of the radius that is let through.
            Defaults to 1e-6.
        detach (bool): Stop the gradient. Defaults to False.

    Returns:
        Tensor: As ``log_radius`` in float64, >= 0.

    Raises:
        ValueError: If ``rho_max`` is not positive.
    """
    if isinstance(rho_max, Tensor):
        if not bool((rho_max > 0).all()):
            raise ValueError(f'rho_max must be positive, got {rho_max}')
        log_bound = rho_max.double().log()
    else:
        check_rho_max(rho_max)
        log_bound = torch.tensor(math.log(rho_max), dtype=torch.float64)
    if detach:
        log_radius = log_radius.detach()
    # a log of 80 is stored to 4e-6 only
    spacing = torch.finfo(log_radius.dtype).eps
    excess = log_radius.double() - log_bound.to(log_radius.device)
    tolerance = slack + spacing * log_bound.abs().to(log_radius.device)
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
    With ``rho_max = 1`` it holds for every step size at once; below 1 the
    radius of a token is at most ``rho_max ** (delta / delta_ref)``.

    Args:
        abscissa (Tensor): Spectral abscissa alpha of A, any shape, 1/step.
            NaN gives NaN.
        rho_max (float): Bound, in (0, 1]. Defaults to 1.0.
        delta_ref (float, optional): Reference step, > 0; needed if ``rho_max
            < 1``.
        slack (float): Excess that is let through, relative to the largest of
            1, the target and ``scale``, so that rounding does not make a
            second application shift again. Defaults to 1e-6.
        scale (Tensor, optional): Size of the entries of A, broadcast against
            ``abscissa``: float32 entries of 16 are stored to 1e-6 only.
        detach (bool): Stop the gradient. Defaults to False.

    Returns:
        Tensor: As ``abscissa``, >= 0, 1/step.

    Raises:
        ValueError: If ``rho_max`` is not in (0, 1], or ``delta_ref`` is
            missing or not positive.
    """
    check_rho_max(rho_max, 'discrete', delta_ref)
    target = 0.0
    if delta_ref is not None and rho_max < 1:
        target = math.log(rho_max) / delta_ref
    if detach:
        abscissa = abscissa.detach()
    tolerance = slack * max(1.0, abs(target))
    excess = abscissa - target
    within = excess <= tolerance
    if scale is not None:
        within = within | (excess <= slack * scale)
    return torch.where(within, 0.0, excess)
