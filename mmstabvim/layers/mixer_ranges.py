"""Ranges of a mixer's tensors: proven for any input, and seen on given ones.

Under autocast the projections and the outputs of convolution, scan, gate and
mixer are in half precision; step size, drive and state stay in float32.
"""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmstabvim.layers.mamba_mixer import MambaMixer
from mmstabvim.layers.rms_norm import RMSNorm
from mmstabvim.layers.selective_ssm import SelectiveSSM, run_directions
from mmstabvim.layers.state_matrix import (
    FullStateMatrix,
    ScanMatrices,
)
from mmstabvim.ops import causal_conv1d_directions, gated_merge
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
    directions = [
        _certify_direction(d, x, slack)
        for d in cast(Iterable[SelectiveSSM], mixer.directions)
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
    direction: SelectiveSSM, x: NormedLinear, slack: float
) -> Ranges:
    """Bound the tensors of one direction; ``x`` is what it reads."""
    conv, step = direction.conv1d, direction.dt_proj
    taps = conv.weight.detach().squeeze(1).double().cpu()
    bias = cast(Tensor, conv.bias).detach().double().cpu()
    given = ScanInput(x, taps, bias, slack)
    dt, B, C = (
        direction.x_proj.weight.detach()
        .double()
        .cpu()
        .split(direction.sizes, dim=0)
    )
    left = step.weight.detach().double().cpu()
    raw = given.projected(dt, left)
    found = dict(
        conv=given.before_silu.magnitude,
        u=given.u.magnitude,
        dt=given.projected(dt).magnitude,
        B=given.projected(B).magnitude,
        C=given.projected(C).magnitude,
        raw_delta=raw.magnitude,
    )
    found['delta'] = F.softplus(raw.high + step.bias.detach().double().cpu())
    scan = _certify_scan(direction, given, (B, C), found)
    y = (1 + slack) * scan.y
    return found | dict(drive=scan.drive, state=scan.state, y=y)


def _certify_scan(
    direction: SelectiveSSM,
    given: ScanInput,
    weights: tuple[Tensor, Tensor],
    found: Ranges,
) -> ScanRanges:
    """Mode by mode; the output also by the norm of the whole state."""
    u, delta = found['u'], found['delta']
    D, b_disc = direction.D.detach().double().cpu(), direction.b_disc
    system = _basis_changes(direction)
    rate, *norms = _whole_state(direction, given, weights, system)
    rate = rate.repeat_interleave(len(u) // len(rate))[:, None]
    B, C = (norm.expand(rate.shape) for norm in norms)
    whole = scan_ranges(u, delta, rate, B, C, D, b_disc)
    if system is None:
        return whole
    B, C = (
        _moduli(given, maps, weight).repeat_interleave(len(u) // len(maps), 0)
        for maps, weight in zip(system[1:], weights, strict=True)
    )
    scan = scan_ranges(u, delta, system.A, B, C, D, b_disc)
    return scan._replace(y=torch.minimum(scan.y, whole.y))


def _whole_state(
    direction: SelectiveSSM,
    given: ScanInput,
    weights: tuple[Tensor, Tensor],
    system: ScanMatrices | None,
) -> list[Tensor]:
    """Rate at which the state's norm decays, and norms of B and C.

    The rate (rows,) is complex where the scan doubles its output.
    """
    if isinstance(direction.state_matrix, FullStateMatrix):
        rate = _logarithmic_norm(direction.state_matrix)
        return [rate, *(given.projected_norm(weight) for weight in weights)]
    A, *changes = cast(ScanMatrices, system)
    rate = A.real.double().amax(1)
    norms = [
        _whole_norm(given, maps, weight)
        for maps, weight in zip(changes, weights, strict=True)
    ]
    return [rate.to(torch.complex128) if A.is_complex() else rate, *norms]


def _logarithmic_norm(matrix: FullStateMatrix) -> Tensor:
    """Of the matrices that the scan runs with, (groups,)."""
    return numerical_abscissa(matrix.dense().double().cpu())


def _basis_changes(direction: SelectiveSSM) -> ScanMatrices | None:
    """How the scan's B and C depend on what is projected from a token.

    Returns:
        ScanMatrices | None: A (d_inner, modes); B and C (groups, width + 1,
        modes): images of the unit vectors, and last of zero.
    """
    weight = direction.x_proj.weight
    width = direction.sizes[1]
    tokens = torch.eye(width + 1, width, dtype=weight.dtype)[None]
    tokens = tokens.to(weight.device)
    found = direction.state_matrix.scan_matrices(tokens, tokens)
    if found is None:
        return None
    A, B, C = (part.detach().cpu() for part in found)
    return ScanMatrices(A, *(m[0].transpose(0, 1) for m in (B, C)))


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
    directions = cast(list[SelectiveSSM], list(mixer.directions))
    x, z = mixer.in_proj(normed).chunk(2, dim=-1)
    outputs = run_directions(directions, x)
    merged = gated_merge(outputs, z)
    shared = dict(normed=normed, x=x, z=z, merged=merged)
    shared['out'] = mixer.out_proj(merged)
    traced = [
        _trace_direction(d, x) | dict(y=y)
        for d, y in zip(directions, outputs, strict=True)
    ]
    return MixerRanges(shared, traced)


def _trace_direction(direction: SelectiveSSM, x: Tensor) -> Ranges:
    """Tensors of one direction up to the state."""
    conv = causal_conv1d_directions(
        x,
        direction.conv1d.weight.squeeze(1)[None],
        cast(Tensor, direction.conv1d.bias)[None],
        [direction.reverse],
    )[0]
    u = F.silu(conv)
    dt, B, C = direction.x_proj(u).split(direction.sizes, dim=-1)
    raw = F.linear(dt, direction.dt_proj.weight)
    delta = direction.step_size(raw)
    found = dict(conv=conv, u=u, dt=dt, B=B, C=C, raw_delta=raw, delta=delta)
    system = direction.state_matrix.scan_matrices(B, C)
    if system is not None:
        found |= _trace_states(direction, u, delta, system)
    return found


def _trace_states(
    direction: SelectiveSSM, u: Tensor, delta: Tensor, system: ScanMatrices
) -> Ranges:
    """Drive and state of each token."""
    A, step = system.A, delta[..., None]
    B = system.B.repeat_interleave(u.shape[-1] // system.B.shape[2], dim=2)
    gain = step * phi1(step * A) if direction.b_disc == 'zoh' else step
    drive = gain * B * u[..., None]
    decay = torch.exp(step * A)
    length = u.shape[1]
    state, states = torch.zeros_like(drive[:, 0]), [drive] * length
    order = range(length)
    for t in reversed(order) if direction.reverse else order:
        state = decay[:, t] * state + drive[:, t]
        states[t] = state
    return dict(drive=drive, state=torch.stack(states, dim=1))


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
