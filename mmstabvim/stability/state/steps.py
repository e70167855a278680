"""Step sizes of a scan: ranges of the discretization, reach of the gradient.

Every function runs without gradients and returns tensors on the device of its
inputs, so that a caller can bring many of them to the host at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmstabvim.stability.inputs import real_part, to_float

VANISHED, EXPLODING = -20.0, 5.0
"""Log-gains below and above which a gradient counts as lost or growing."""

UNDERFLOW = {torch.float32: 87.0, torch.float16: 11.0, torch.bfloat16: 87.0}
"""``delta |Re lambda|`` above which ``exp`` leaves the normal numbers."""

SKIPPED = 1e-4
"""Step size below which a token leaves the state as it is."""


class GradientFlow(NamedTuple):
    """Reach of the gradient from the last token walked to the first."""

    vanished: Tensor
    """Fraction of (batch, channel, mode) below ``VANISHED``, scalar."""
    exploding: Tensor
    """Fraction above ``EXPLODING``, scalar."""
    horizon: Tensor
    """Quantiles of the memory horizon over (channel, mode), tokens."""


class StepRanges(NamedTuple):
    """Ranges of the discretization, scalars."""

    delta_min: Tensor
    delta_max: Tensor
    delta_mean: Tensor
    skipped: Tensor
    """Fraction of steps below ``SKIPPED``."""
    max_decay_exponent: Tensor
    """Largest ``delta |Re lambda|``; compare with ``UNDERFLOW``."""
    max_phase: Tensor
    """Largest ``delta |Im lambda|``; above pi it aliases."""
    decay_min: Tensor
    """Smallest ``|exp(delta lambda)|``."""
    decay_max: Tensor
    """Largest ``|exp(delta lambda)|``; above 1 the state grows."""


@torch.no_grad()
def gradient_flow(
    delta: Tensor,
    eigenvalues: Tensor,
    reverse: bool = False,
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9),
) -> GradientFlow:
    """Measure how far the gradient reaches through the state.

    From the last token walked to the first, the gradient of a mode is
    multiplied by ``exp(Re lambda S)``, S the sum of the steps between. The
    horizon of a mode is ``1 / (|Re lambda| mean(delta))`` tokens, with
    the mean over the channel's tokens; infinite at ``Re lambda = 0``.
    Quantiles are taken of its inverse, so that infinities do no harm.

    Args:
        delta (Tensor): (batch, length, dim), step size after softplus.
        eigenvalues (Tensor): (dim, N), real or complex, 1/step.
        reverse (bool): Tokens are walked from the last to the first. Defaults
            to False.
        quantiles (tuple[float, ...]): In [0, 1]. Defaults to (0.1, 0.5, 0.9).

    Returns:
        GradientFlow: The horizons' quantiles in the order asked for.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> delta = torch.full((1, 101, 1), 0.1)
        >>> flow = gradient_flow(delta, torch.tensor([[-3.0, 1.0]]))
        >>> flow.vanished.item(), flow.exploding.item()
        (0.5, 0.5)
    """
    _check_steps(delta, eigenvalues)
    real = real_part(eigenvalues)
    delta = to_float(delta)
    rest = delta[:, :-1] if reverse else delta[:, 1:]
    gains = rest.sum(1)[..., None] * real  # (batch, dim, N)
    rate = real.abs() * delta.mean((0, 1))[:, None]  # 1/token
    at = rate.new_tensor([1 - q for q in quantiles])
    return GradientFlow(
        (gains < VANISHED).to(gains.dtype).mean(),
        (gains > EXPLODING).to(gains.dtype).mean(),
        1 / torch.quantile(rate.flatten(), at),
    )


@torch.no_grad()
def step_ranges(delta: Tensor, eigenvalues: Tensor) -> StepRanges:
    """Ranges of the steps and of ``exp(delta lambda)``.

    Args:
        delta (Tensor): (batch, length, dim), step size after softplus, >= 0.
        eigenvalues (Tensor): (dim, N), real or complex, 1/step.

    Returns:
        StepRanges: Scalars, float32 or wider.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> delta = torch.tensor([[[0.5], [0.25]]])
        >>> step_ranges(delta, torch.tensor([[-1.0, -4.0]])).max_decay_exponent
        tensor(2.)
    """
    _check_steps(delta, eigenvalues)
    delta, real = to_float(delta), real_part(eigenvalues)
    least, most = delta.amin((0, 1)), delta.amax((0, 1))  # (dim,)
    low, high = real.amin(-1), real.amax(-1)
    phase = torch.zeros_like(most)
    if eigenvalues.is_complex():
        phase = most * eigenvalues.imag.abs().amax(-1)
    return StepRanges(
        least.amin(),
        most.amax(),
        delta.mean(),
        (delta < SKIPPED).to(delta.dtype).mean(),
        (most * real.abs().amax(-1)).amax(),
        phase.amax(),
        (low * torch.where(low < 0, most, least)).amin().exp(),
        (high * torch.where(high < 0, least, most)).amax().exp(),
    )


def _check_steps(delta: Tensor, eigenvalues: Tensor) -> None:
    fits = delta.dim() == 3 and eigenvalues.dim() == 2
    if not fits or delta.shape[-1] != eigenvalues.shape[0]:
        raise ValueError(
            'want delta (batch, length, dim) and eigenvalues (dim, N), got '
            f'{tuple(delta.shape)} and {tuple(eigenvalues.shape)}'
        )
