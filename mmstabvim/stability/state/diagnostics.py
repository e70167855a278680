"""What to look at while a state space model trains.

Every function runs without gradients and returns tensors on the device of its
inputs, so that a caller can bring many of them to the host at once.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmstabvim.stability.inputs import check_choice, dense, real_dtype
from mmstabvim.stability.state.eigenbasis import condition_number
from mmstabvim.stability.state.spectra import numerical_abscissa

VANISHED, EXPLODING = -20.0, 5.0
"""Log-gains below and above which a gradient counts as lost or growing."""

UNDERFLOW = {torch.float32: 87.0, torch.float16: 11.0, torch.bfloat16: 87.0}
"""``delta |Re lambda|`` above which ``exp`` leaves the normal numbers."""

SKIPPED = 1e-4
"""Step size below which a token leaves the state as it is."""


class StateGrowth(NamedTuple):
    """Size of the state over the tokens, (batch, dim) each."""

    max_norm: Tensor
    final_ratio: Tensor
    """Norm after the last token over the median norm."""
    slope: Tensor
    """Least-squares slope of the log-norm, 1/token; > 0 grows."""


class GradientFlow(NamedTuple):
    """What the first token's gradient has become at the last one."""

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
def state_growth(states: Tensor) -> StateGrowth:
    """Measure whether the state grows over the tokens.

    Args:
        states (Tensor): (batch, length, dim, N), the state after each token
            in the order walked, real or complex. Tokens whose state is 0 do
            not enter the slope; with fewer than two others it is 0.

    Returns:
        StateGrowth: float32 or wider.

    Raises:
        ValueError: If ``states`` is not 4-D or empty.
    """
    if states.dim() != 4 or states.numel() == 0:
        raise ValueError(
            'states must be (batch, length, dim, N) and not empty, got '
            f'{tuple(states.shape)}'
        )
    wide = torch.float64 if _double(states) else torch.float32
    norm = torch.linalg.vector_norm(states, dim=-1, dtype=_like(states, wide))
    median = _median(norm)
    ratio = norm[:, -1] / torch.where(median == 0, 1.0, median)
    return StateGrowth(norm.amax(1), ratio, _log_slope(norm))


@torch.no_grad()
def state_bound(
    drive_max: Tensor,
    eigenvalues: Tensor,
    delta_max: Tensor | float,
    b_disc: str = 'euler',
) -> Tensor:
    """Largest modulus a mode can reach, whatever the tokens are.

    ``|h_n| <= max_t |B_t u_t| (1 / |Re lambda_n| + delta_max)`` for
    ``'euler'``, without ``delta_max`` for ``'zoh'``; infinite unless
    ``Re lambda_n < 0``.

    Args:
        drive_max (Tensor): ``max_t |B_t u_t|``, >= 0, broadcast against
            ``eigenvalues``.
        eigenvalues (Tensor): (dim, N), real or complex, 1/step.
        delta_max (Tensor or float): Largest step, broadcast likewise.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.

    Returns:
        Tensor: (dim, N), or as broadcast.

    Raises:
        ValueError: If ``b_disc`` is unknown.
    """
    check_choice('b_disc', b_disc, ('euler', 'zoh'))
    real = _real(eigenvalues)
    horizon = torch.where(real < 0, -1 / real, torch.inf)
    if b_disc == 'euler':
        horizon = horizon + delta_max
    # no drive, no state: not 0 * inf
    return torch.where(drive_max == 0, 0.0, drive_max * horizon)


@torch.no_grad()
def token_log_gains(
    delta: Tensor, eigenvalues: Tensor, reverse: bool = False
) -> Tensor:
    """Log-modulus of ``d h_T / d h_t`` for every token t, mode by mode.

    ``Re(lambda_n) (S_T - S_t)`` with the sum of steps ``S_t``; T is the last
    token walked.

    Args:
        delta (Tensor): (batch, length, dim), step size after softplus.
        eigenvalues (Tensor): (dim, N), real or complex, 1/step.
        reverse (bool): Tokens are walked from the last to the first. Defaults
            to False.

    Returns:
        Tensor: (batch, length, dim, N), dimensionless, float32 or wider.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check_steps(delta, eigenvalues)
    remaining = _remaining_steps(delta, reverse)
    return remaining[..., None] * _real(eigenvalues)


@torch.no_grad()
def token_log_gain_bound(
    delta: Tensor, abscissa: Tensor, condition: Tensor, reverse: bool = False
) -> Tensor:
    """Bound of ``ln ||d h_T / d h_t||`` for dense state matrices.

    ``ln kappa + alpha (S_T - S_t)``, with the condition number kappa of the
    eigenvectors, as ``||exp(s A)|| <= kappa exp(s alpha)``.

    Args:
        delta (Tensor): (batch, length, dim), step size after softplus, >= 0.
        abscissa (Tensor): (groups,), spectral abscissa, 1/step; channel d
            uses matrix ``d // (dim / groups)``.
        condition (Tensor): (groups,), >= 1.
        reverse (bool): As in :func:`token_log_gains`. Defaults to False.

    Returns:
        Tensor: (batch, length, dim), dimensionless, float32 or wider.

    Raises:
        ValueError: If the shapes do not fit.
    """
    groups = abscissa.numel()
    fits = abscissa.dim() == 1 and condition.shape == abscissa.shape
    if not (fits and delta.dim() == 3 and groups):
        raise ValueError(
            'want delta (batch, length, dim), abscissa and condition '
            f'(groups,), got {tuple(delta.shape)}, {tuple(abscissa.shape)}, '
            f'{tuple(condition.shape)}'
        )
    channels, rest = divmod(delta.shape[-1], groups)
    if rest:
        raise ValueError(f'groups={groups} must divide dim={delta.shape[-1]}')
    alpha = abscissa.repeat_interleave(channels)
    log_condition = condition.log().repeat_interleave(channels)
    return log_condition + alpha * _remaining_steps(delta, reverse)


@torch.no_grad()
def gradient_flow(
    delta: Tensor,
    eigenvalues: Tensor,
    reverse: bool = False,
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9),
) -> GradientFlow:
    """How far the gradient reaches through the state.

    The horizon of a mode is ``1 / (|Re lambda| mean(delta))`` tokens, with
    the mean over the channel's tokens; infinite at ``Re lambda = 0``.
    Quantiles are taken of its inverse, so that infinities do no harm.

    Args:
        delta (Tensor): (batch, length, dim), step size after softplus.
        eigenvalues (Tensor): (dim, N), real or complex, 1/step.
        reverse (bool): As in :func:`token_log_gains`. Defaults to False.
        quantiles (tuple[float, ...]): In [0, 1]. Defaults to (0.1, 0.5, 0.9).

    Returns:
        GradientFlow: The horizons' quantiles in the order asked for.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check_steps(delta, eigenvalues)
    real = _real(eigenvalues)
    delta = _float(delta)
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
def transient_peak(A: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Largest ``||exp(t A)||`` on a grid of times, and where.

    A stable matrix that is not normal amplifies before it decays.

    Args:
        A (Tensor): (..., N, N), 1/step.
        times (Tensor): (T,), >= 0, steps.

    Returns:
        tuple[Tensor, Tensor]: Peak (...), a lower bound of the supremum, and
        its time (...). Computed in float64; at least float32.

    Raises:
        ValueError: If ``A`` is not square or not finite, or ``times`` is not
            a non-empty vector.

    Source: Trefethen and Embree, Spectra and Pseudospectra, Sec. 14.
    """
    norms, times = _growth_on_grid(A, times)
    peak, index = norms.max(0)
    dtype = real_dtype(A)
    return peak.to(A.device, dtype), times[index].to(A.device, dtype)


@torch.no_grad()
def transient_bounds(A: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds ``exp(mu t)`` and ``kappa exp(alpha t)`` of growth.

    With numerical abscissa mu, spectral abscissa alpha and the condition
    number kappa of the eigenvectors; the first is tight for small t, the
    second for large t.

    Args:
        A (Tensor): (..., N, N), 1/step.
        times (Tensor): (T,), >= 0, steps.

    Returns:
        tuple[Tensor, Tensor]: (T, ...) each. Computed in float64; at least
        float32. Without eigenbasis the second is huge or infinite.

    Raises:
        ValueError: As :func:`transient_peak`.

    Source: Trefethen and Embree, Spectra and Pseudospectra, Sec. 14 and 17.
    """
    matrix, times = dense('A', A), _grid(times)
    times = times.reshape(-1, *[1] * (A.dim() - 2))
    values, vectors = torch.linalg.eig(matrix)
    alpha = values.real.amax(-1)
    by_mu = torch.exp(times * numerical_abscissa(matrix))
    by_alpha = condition_number(vectors) * torch.exp(times * alpha)
    dtype = real_dtype(A)
    return by_mu.to(A.device, dtype), by_alpha.to(A.device, dtype)


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
    """
    _check_steps(delta, eigenvalues)
    delta, real = _float(delta), _real(eigenvalues)
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


@torch.no_grad()
def count_nonfinite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Number of NaN and infinite elements of each tensor.

    Args:
        tensors (Mapping[str, Tensor]): By name, in the order of computation
            if the first culprit is to be told.

    Returns:
        dict[str, Tensor]: By name in the same order, int64 scalars on the
        tensors' devices. Nothing is replaced.
    """
    return {
        name: (~torch.isfinite(tensor)).sum()
        for name, tensor in tensors.items()
    }


def _double(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.complex128)


def _like(tensor: Tensor, real: torch.dtype) -> torch.dtype:
    return real.to_complex() if tensor.is_complex() else real


def _float(tensor: Tensor) -> Tensor:
    """A real tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _real(eigenvalues: Tensor) -> Tensor:
    """Real parts in float32 or wider."""
    return _float(
        eigenvalues.real if eigenvalues.is_complex() else eigenvalues
    )


def _check_steps(delta: Tensor, eigenvalues: Tensor) -> None:
    fits = delta.dim() == 3 and eigenvalues.dim() == 2
    if not fits or delta.shape[-1] != eigenvalues.shape[0]:
        raise ValueError(
            'want delta (batch, length, dim) and eigenvalues (dim, N), got '
            f'{tuple(delta.shape)} and {tuple(eigenvalues.shape)}'
        )


def _remaining_steps(delta: Tensor, reverse: bool) -> Tensor:
    """Sum of the steps after each token in the order walked."""
    delta = _float(delta)
    if reverse:
        return delta.cumsum(1) - delta
    return delta.flip(1).cumsum(1).flip(1) - delta


def _median(norm: Tensor) -> Tensor:
    """Median of (batch, length, dim) over length, mean of the middle two."""
    # torch.median takes the lower one, torch.quantile refuses large inputs
    ordered, last = norm.sort(dim=1).values, norm.shape[1] - 1
    return (ordered[:, last // 2] + ordered[:, -(-last // 2)]) / 2


def _log_slope(norm: Tensor) -> Tensor:
    """Slope of the log of (batch, length, dim) over length, where > 0."""
    weight = (norm > 0).to(norm.dtype)
    log = torch.where(norm > 0, norm, 1.0).log()
    time = torch.arange(norm.shape[1], device=norm.device, dtype=norm.dtype)
    time = time[None, :, None]
    count = weight.sum(1, keepdim=True).clamp(min=1)
    centred = (time - (weight * time).sum(1, keepdim=True) / count) * weight
    spread = (centred * centred).sum(1)
    return (centred * log).sum(1) / torch.where(spread == 0, 1.0, spread)


def _grid(times: Tensor) -> Tensor:
    if times.dim() != 1 or times.numel() == 0:
        raise ValueError(
            f'times must be a non-empty vector, got {tuple(times.shape)}'
        )
    return times.to('cpu', torch.float64)


def _growth_on_grid(A: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """``||exp(t A)||`` as (T, ...), and the times, float64 on the CPU."""
    matrix, times = dense('A', A), _grid(times)
    column = times.reshape(-1, *[1] * A.dim())
    powers = torch.linalg.matrix_exp(column * matrix)
    return torch.linalg.matrix_norm(powers, 2), times
