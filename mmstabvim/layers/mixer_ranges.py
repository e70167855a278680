"""Ranges of a mixer's tensors: proven for any input, and seen on given ones.

Under autocast the projections and the outputs of convolution, scan, gate and
mixer are in half precision; step size, drive and state stay in float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmstabvim.layers.mamba_mixer import DirectionWeights, MambaMixer
from mmstabvim.layers.rms_norm import RMSNorm
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.layers.state_matrix import Full, ScanMatrices, StateMatrix
from mmstabvim.ops.selective_scan.discretization import phi1
from mmstabvim.stability.ranges.certified import (
    Interval,
    NormedLinear,
    ScanInput,
    ScanRanges,
    rounding_slack,
    scan_ranges,
)
from mmstabvim.stability.state.spectra import numerical_abscissa

SHARED = ('normed', 'x', 'z', 'merged', 'out')
"""Tensors of a mixer that its directions share."""

DIRECTED = (
    *('conv', 'u', 'dt', 'B', 'C'),
    *('raw_delta', 'delta', 'drive', 'state', 'y'),
)
"""Tensors of each direction, in the order in which they are computed."""

FLOAT32 = ('delta', 'drive', 'state')
"""Tensors that autocast leaves in float32."""

Ranges = dict[str, Tensor]


class MixerRanges(NamedTuple):
    """Tensors, or their largest absolute values, by name."""

    shared: Ranges
    directions: list[Ranges]


@torch.no_grad()
def certify_mixer(
    mixer: MambaMixer,
    norm: RMSNorm,
    dtype: torch.dtype | None = torch.float16,
) -> MixerRanges:
    """Bound every tensor of a mixer for any tokens, of any length.

    The bounds rest on the norm before the mixer, the weights and the
    eigenvalues alone. They hold in training, too.

    Args:
        mixer (MambaMixer): Finite weights.
        norm (RMSNorm): What the mixer's input comes from.
        dtype (torch.dtype, optional): Of autocast: its rounding is counted.
            None is exact arithmetic. Defaults to float16.

    Returns:
        MixerRanges: Largest absolute values: normed (d_model,), x, z,
        merged, conv, u, raw_delta, delta and y (d_inner,), dt (dt_rank,), B
        and C as projected from a token, drive and state (d_inner, modes), out
        (d_model,); float64. Infinite where an eigenvalue has no negative real
        part. The scan's recurrence is bounded in exact arithmetic.

    Raises:
        ValueError: If a weight is not finite.

    Source: docs/ranges.md.
    """
    _check_finite(mixer, norm)
    unit = 0.0 if dtype is None else torch.finfo(dtype).eps / 2
    out_weight = mixer.out_proj.weight.detach().double().cpu()
    slack = rounding_slack(unit, out_weight.shape[1])
    scale = norm.weight.detach().double().cpu()
    weight = mixer.in_proj.weight.detach().double().cpu()
    x, z = (NormedLinear(half, scale) for half in weight.chunk(2))
    changes = _basis_changes(mixer.ssm)
    directions = [
        _certify_direction(
            mixer.ssm,
            k,
            weights,
            x,
            None if changes is None else changes[k],
            slack,
        )
        for k, weights in enumerate(mixer.direction_weights())
    ]
    gate = (1 + slack) * z.outputs
    y = torch.stack([found['y'] for found in directions]).mean(0)
    merged = (1 + slack) * y * F.silu(gate)
    shared = dict(
        normed=(1 + slack) * len(scale) ** 0.5 * scale.abs(),
        x=(1 + slack) * x.outputs,
        z=gate,
        merged=merged,
        out=_certify_output(out_weight, y, z, merged, slack),
    )
    return MixerRanges(shared, directions)


def _certify_output(
    weight: Tensor, y: Tensor, z: NormedLinear, merged: Tensor, slack: float
) -> Tensor:
    """Bound ``weight @ merged``: entry by entry, or with ``|silu(z)| <= |z|``.

    The second knows that the gates of one token cannot all be large.
    """
    used = weight != 0  # an infinite entry that is not read is none
    entries = torch.where(used, weight.abs() * merged, 0.0).sum(1)
    reads = torch.where(used, weight.abs() * y, 0.0).square()
    gates = (1 + slack) * z.absolute_sum(reads.sum(1), reads @ z.rows.square())
    gates = gates + slack * reads.sqrt() @ z.outputs
    return (1 + slack) * torch.minimum(entries, gates)


def _check_finite(*modules: torch.nn.Module) -> None:
    for module in modules:
        for name, weight in module.named_parameters():
            if not torch.isfinite(weight).all():
                raise ValueError(f'{name} has a NaN or an infinity')


def _certify_direction(
    ssm: SelectiveSSM,
    number: int,
    weights: DirectionWeights,
    x: NormedLinear,
    system: ScanMatrices | None,
    slack: float,
) -> Ranges:
    """Bound the tensors of one direction; ``x`` is its input."""
    wide = DirectionWeights(*(w.detach().double().cpu() for w in weights))
    given = ScanInput(x, wide.taps, wide.conv_bias, slack)
    raw = given.projected(wide.dt_rows, wide.dt_proj)
    found = dict(
        conv=given.before_silu.magnitude,
        u=given.u.magnitude,
        dt=given.projected(wide.dt_rows).magnitude,
        B=given.projected(wide.B_rows).magnitude,
        C=given.projected(wide.C_rows).magnitude,
        raw_delta=raw.magnitude,
    )
    found['delta'] = F.softplus(raw.high + wide.dt_bias)
    scan = _certify_scan(ssm, number, given, wide, system, found)
    y = (1 + slack) * scan.y
    return found | dict(drive=scan.drive, state=scan.state, y=y)


def _certify_scan(
    ssm: SelectiveSSM,
    number: int,
    given: ScanInput,
    weights: DirectionWeights,
    system: ScanMatrices | None,
    found: Ranges,
) -> ScanRanges:
    """Bound mode by mode; the output also by the norm of the whole state."""
    u, delta, b_disc = found['u'], found['delta'], ssm.b_disc
    rows = weights.B_rows, weights.C_rows
    rate, *norms = _whole_state(ssm.state_matrix, number, given, rows, system)
    rate = rate.repeat_interleave(len(u) // len(rate))[:, None]
    B, C = (norm.expand(rate.shape) for norm in norms)
    whole = scan_ranges(u, delta, rate, B, C, weights.D, b_disc)
    if system is None:
        return whole
    B, C = (
        _moduli(given, maps, weight).repeat_interleave(len(u) // len(maps), 0)
        for maps, weight in zip(system[1:], rows, strict=True)
    )
    scan = scan_ranges(u, delta, system.A, B, C, weights.D, b_disc)
    return scan._replace(y=torch.minimum(scan.y, whole.y))


def _whole_state(
    matrix: StateMatrix,
    number: int,
    given: ScanInput,
    weights: tuple[Tensor, Tensor],
    system: ScanMatrices | None,
) -> list[Tensor]:
    """Return the decay rate of the state's norm, and norms of B and C.

    The rate (rows,) is complex where the scan doubles its output.
    """
    if isinstance(matrix.parametrization, Full) or system is None:
        # the logarithmic norm of the matrices that the scan runs with
        dense = matrix.by_direction(matrix.dense())[number]
        rate = numerical_abscissa(dense.double().cpu())
        return [rate, *(given.projected_norm(weight) for weight in weights)]
    A, *changes = system
    rate = A.real.double().amax(1)
    norms = [
        _whole_norm(given, maps, weight)
        for maps, weight in zip(changes, weights, strict=True)
    ]
    return [rate.to(torch.complex128) if A.is_complex() else rate, *norms]


def _basis_changes(ssm: SelectiveSSM) -> list[ScanMatrices] | None:
    """Map what is projected from a token to the scan's B and C.

    Returns:
        list[ScanMatrices] | None: Of each direction A (d_inner, modes); B and
        C (groups, width + 1, modes): images of the unit vectors, and last of
        zero.
    """
    weight, width = ssm.x_proj.weight, ssm.sizes[1]
    tokens = torch.eye(width + 1, width, dtype=weight.dtype).to(weight.device)
    tokens = tokens.expand(ssm.order.directions, 1, -1, -1)
    found = ssm.state_matrix.scan_matrices(tokens, tokens)
    if found is None:
        return None
    A, B, C = (part.detach().cpu() for part in found)
    return [
        ScanMatrices(one, *(m[0].transpose(0, 1) for m in maps))
        for one, *maps in zip(A, B, C, strict=True)
    ]


def _split_maps(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix (groups, modes, width) and constant (groups, modes).

    Real and imaginary part, where there are two, in a last dimension.
    """
    if maps.is_complex():
        maps = torch.view_as_real(maps)
    maps = maps.double() if maps.dim() == 4 else maps.double()[..., None]
    return (maps[:, :-1] - maps[:, -1:]).transpose(1, 2), maps[:, -1]


def _moduli(given: ScanInput, maps: Tensor, weight: Tensor) -> Tensor:
    """Bound each entry of B or C in the scan's basis, (groups, modes)."""
    change, constant = _split_maps(maps)
    rows = change.movedim(2, 3).flatten(0, 2)  # (groups modes parts, width)
    low, high = given.projected(weight, rows)
    offset = constant.flatten()
    sizes = Interval(low + offset, high + offset).magnitude
    return sizes.reshape(constant.shape).norm(dim=-1)


def _whole_norm(given: ScanInput, maps: Tensor, weight: Tensor) -> Tensor:
    """Bound the norm of B or C in the scan's basis, a scalar."""
    change, constant = _split_maps(maps)
    rows = change.movedim(2, 3).flatten(0, 2)
    return given.projected_norm(weight, rows) + constant.norm()


# ---------------------------------------------------------- on given tokens


def trace_mixer(mixer: MambaMixer, normed: Tensor) -> MixerRanges:
    """Compute every tensor of a mixer that :func:`certify_mixer` bounds.

    Args:
        mixer (MambaMixer): The mixer.
        normed (Tensor): (batch, length, d_model), what it reads.

    Returns:
        MixerRanges: Tensors (batch, length, ...), differentiable; drive and
        state (batch, length, d_inner, modes), which are left out where the
        scan runs by the matrix exponential.
    """
    ssm = mixer.ssm
    x, z = mixer.in_proj(normed).chunk(2, dim=-1)
    conv = mixer.conv1d(x, activation=None)
    u = F.silu(conv)
    dt, B, C = ssm.x_proj(u).split(ssm.sizes, dim=-1)
    raw = ssm.dt_proj(dt)
    tensors = dict(conv=conv, u=u, dt=dt, B=B, C=C, raw_delta=raw)
    tensors['delta'] = ssm.step_size(raw)
    system = ssm.state_matrix.scan_matrices(B, C)
    if system is not None:
        tensors |= _trace_states(ssm, u, tensors['delta'], system)
    tensors['y'] = ssm(mixer.conv1d(x))
    merged = mixer.merge(tensors['y'], z)
    shared = dict(normed=normed, x=x, z=z, merged=merged)
    shared['out'] = mixer.out_proj(merged)
    count = ssm.order.directions
    return MixerRanges(
        shared,
        [{name: t[k] for name, t in tensors.items()} for k in range(count)],
    )


def _trace_states(
    ssm: SelectiveSSM, u: Tensor, delta: Tensor, system: ScanMatrices
) -> Ranges:
    """Compute drive and state of each token."""
    A, step = system.A[:, None, None], delta[..., None]
    B = system.B.repeat_interleave(u.shape[-1] // system.B.shape[3], dim=3)
    gain = step * phi1(step * A) if ssm.b_disc == 'zoh' else step
    drive = gain * B * u[..., None]
    decay = torch.exp(step * A)
    both = zip(drive, decay, ssm.order.reverse, strict=True)
    return dict(drive=drive, state=torch.stack([_states(*x) for x in both]))


def _states(drive: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """Walk one direction, (batch, length, d_inner, modes)."""
    length = drive.shape[1]
    state, states = torch.zeros_like(drive[:, 0]), [drive] * length
    order = range(length)
    for t in reversed(order) if reverse else order:
        state = decay[:, t] * state + drive[:, t]
        states[t] = state
    return torch.stack(states, dim=1)


@torch.no_grad()
def largest_values(traced: MixerRanges) -> list[dict[str, float]]:
    """Largest absolute value of each tensor.

    Args:
        traced (MixerRanges): Bounds, or tensors of a trace.

    Returns:
        list[dict[str, float]]: Of the shared tensors, then of each direction.
        NaN where a tensor has one.
    """
    return [
        {name: float(value.abs().max()) for name, value in part.items()}
        for part in (traced.shared, *traced.directions)
    ]
