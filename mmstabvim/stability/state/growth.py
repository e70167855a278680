"""Growth of a state along a sequence, and bounds of it."""

import torch
from torch import Tensor


def growth_exponent(
    delta: Tensor, real: Tensor, length: float | None = None
) -> Tensor:
    """Largest exponent by which a mode grows between two tokens.

    ``Gamma(L) = max over s < t <= L of sum_{tau = s+1..t} delta_tau Re
    lambda``, over all modes and channels, in nats. Steps are not negative, so
    a growing mode grows most over the whole sequence, and a fading one least
    over its shortest step. A state grows by at most ``kappa exp(Gamma)`` with
    the condition number kappa of the eigenvectors.

    Args:
        delta (Tensor): (..., length, dim), step sizes after softplus, >= 0,
            in steps.
        real (Tensor): (dim, modes) or (1, modes), real parts of the
            eigenvalues, 1/step.
        length (float, optional): Tokens of a longer sequence with the same
            mean step in each channel. Defaults to None, for the given
            sequence, where the result is exact.

    Returns:
        Tensor: Scalar, nats; above 0 where a mode grows.

    Raises:
        ValueError: If shapes do not fit or a step is negative.

    Example:
        >>> delta = torch.full((1, 197, 1), 0.1)
        >>> growth_exponent(delta, torch.tensor([[0.5, -1.0]])).round().item()
        10.0
    """
    if delta.dim() < 2 or real.dim() != 2:
        raise ValueError(
            'want delta (..., length, dim) and real (dim, modes), got '
            f'{tuple(delta.shape)} and {tuple(real.shape)}'
        )
    if real.shape[0] not in (1, delta.shape[-1]):
        raise ValueError(
            f'dim differs: delta {tuple(delta.shape)}, real '
            f'{tuple(real.shape)}'
        )
    if (delta < 0).any():
        raise ValueError('delta must not be negative')
    flat = delta.double().flatten(0, -3) if delta.dim() > 2 else delta[None]
    flat = flat.double()
    whole = flat.sum(1).amax(0)  # (dim,)
    if length is not None:
        whole = whole * (length / flat.shape[1])
    return growth_of_sums(whole, flat.amin((0, 1)), real)


def growth_of_sums(whole: Tensor, least: Tensor, real: Tensor) -> Tensor:
    """Growth exponent from the sum and the smallest of the steps.

    Args:
        whole (Tensor): (dim,), largest sum of a sequence's steps.
        least (Tensor): (dim,), smallest step.
        real (Tensor): (dim, modes) or (1, modes), 1/step.

    Returns:
        Tensor: Scalar, nats.
    """
    real = real.double()
    grows = whole.double()[:, None] * real
    fades = least.double()[:, None] * real
    return torch.where(real > 0, grows, fades).amax()


def growth_exponent_bound(
    delta_max: Tensor, real: Tensor, length: float
) -> Tensor:
    """Bound the growth exponent for any input, from the largest steps.

    Args:
        delta_max (Tensor): (dim,), bounds of the step sizes, for example
            certified ones, in steps; may be infinite.
        real (Tensor): (dim, modes) or (1, modes), 1/step.
        length (float): Tokens.

    Returns:
        Tensor: Scalar, nats, >= 0; 0 where no mode grows.

    Example:
        >>> growth_exponent_bound(
        ...     torch.tensor([2.0]), torch.tensor([[-1.0]]), 197
        ... ).item()
        0.0
    """
    growing = real.double().amax(-1) > 0
    rate = torch.where(growing, real.double().amax(-1), 0.0)
    largest = torch.where(growing, delta_max.double() * length, 0.0)
    return (largest * rate).amax()


def state_gain_bound(
    condition: Tensor, abscissa: Tensor, delta_max: Tensor, length: float
) -> Tensor:
    """Bound the norm of the state per unit of ``|u_t| ||B_t||``.

    ``||h_t|| <= kappa sum_s exp(alpha (S_t - S_s)) delta_s |u_s| ||B_s||``.
    For negative alpha the sum is at most ``1 / |alpha| + delta_max``, for any
    length; otherwise at most ``exp(alpha delta_max L) delta_max L``. It bounds
    the state in the eigenbasis too.

    Args:
        condition (Tensor): Condition number kappa of the eigenvectors, >= 1,
            any shape.
        abscissa (Tensor): Spectral abscissa alpha, same shape, 1/step.
        delta_max (Tensor): Largest step, same shape, in steps.
        length (float): Tokens.

    Returns:
        Tensor: Bound, same shape, in steps.

    Source: docs/stabilizers.md.

    Example:
        >>> one = torch.ones(())
        >>> state_gain_bound(one, -0.01 * one, one, torch.inf).round().item()
        101.0
    """
    stable = abscissa < 0
    rate = torch.where(stable, abscissa.abs(), 1.0)
    tokens = torch.where(stable, 0.0, delta_max * length)
    tokens = torch.where(delta_max == 0, 0.0, tokens)
    growth = torch.where(stable, 0.0, abscissa * tokens)
    growth = torch.where(abscissa == 0, 0.0, growth)
    total = torch.where(stable, 1 / rate + delta_max, growth.exp() * tokens)
    return condition * total
