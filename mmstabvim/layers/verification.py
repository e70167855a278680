"""Check that a model's state matrices are stable, and bound its states."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmstabvim.layers.mamba_mixer import MambaMixer
from mmstabvim.layers.mixer_ranges import certify_mixer
from mmstabvim.layers.rms_norm import RMSNorm
from mmstabvim.layers.scan_order import direction_name
from mmstabvim.layers.state_matrix import (
    Full,
    StateMatrix,
    state_matrices,
)
from mmstabvim.stability.state.eigenbasis import KINDS
from mmstabvim.stability.state.growth import (
    growth_exponent_bound,
    state_gain_bound,
)

REAL = 'real'
"""Kind of a diagonal matrix with real eigenvalues."""


class StabilityError(RuntimeError):
    """A state matrix violates what was asked of it."""


class VerifiedMatrix(NamedTuple):
    """Properties of the state matrices of one direction of one layer.

    Each number is the worst of its matrices.
    """

    name: str
    """Name of the state matrix in the model, and number of the direction."""
    kind: str
    """Arithmetic of the scan: ``'real'``, ``'complex64'``, ``'complex128'``
    or ``'exponential'``."""
    abscissa: float
    """Largest real part of an eigenvalue, 1/step; stable below 0."""
    radius: float
    """Largest modulus of an eigenvalue, 1/step."""
    condition: float
    """Condition number of the eigenvectors, >= 1."""
    delta_max: float
    """Bound of the step size for any input, in steps; infinite where the
    matrix is in no mixer behind a norm."""
    growth: float
    """Bound of the growth exponent over the sequence, nats."""
    state_gain: float
    """``||h_t|| <= state_gain max |u| max ||B||``, in steps."""
    state: float
    """Bound of ``||h_t||`` for any input."""


class Verification(tuple[VerifiedMatrix, ...]):
    """The rows of a table; its text is the table."""

    __slots__ = ()

    def __str__(self) -> str:
        """A line for each direction of each layer."""
        width = max([len(row.name) for row in self], default=4)
        title = (
            f'{"matrix":<{width}} {"kind":<11} {"abscissa":>10} '
            f'{"radius":>9} {"condition":>9} {"growth":>9} {"state":>9}'
        )
        lines = [
            f'{row.name:<{width}} {row.kind:<11} {row.abscissa:>10.3g} '
            f'{row.radius:>9.3g} {row.condition:>9.3g} {row.growth:>9.3g} '
            f'{row.state:>9.3g}'
            for row in self
        ]
        return '\n'.join([title, *lines])


@torch.no_grad()
def verify(
    model: nn.Module,
    length: float,
    eps: float = 0.0,
    condition_max: float = math.inf,
    strict: bool = True,
) -> Verification:
    """Check every state matrix of a model, as the scan runs with it.

    Eigenvalues and condition numbers are computed in float64 from what is
    stored. The bounds hold for every input, in exact arithmetic: those of the
    step size, of u and of B are the ones of a certificate of ranges.

    Args:
        model (nn.Module): With at least one state matrix.
        length (float): Tokens of a sequence, > 0; ``math.inf`` is allowed.
        eps (float): Least decay rate asked for, >= 0, 1/step; with 0 a
            negative real part is enough. Defaults to 0.
        condition_max (float): Largest condition number of eigenvectors.
            Defaults to infinity.
        strict (bool): Raise if a matrix violates a bound. Defaults to True.

    Returns:
        Verification: A :class:`VerifiedMatrix` for each direction of each
        layer; as text, a table.

    Raises:
        ValueError: If the model has no state matrix, a parameter is not
            finite, or an argument is out of range.
        StabilityError: If a matrix violates a bound, naming the worst.

    Source: docs/stabilizers.md.

    Example:
        >>> from mmstabvim import VisionMamba
        >>> model = VisionMamba(dict(embed_dims=8, num_layers=1, d_state=2))
        >>> max(row.abscissa for row in verify(model, length=65))
        -1.0
    """
    if not length > 0 or not 0 <= eps < math.inf or not condition_max >= 1:
        raise ValueError(
            'want length > 0, eps >= 0 and condition_max >= 1, got '
            f'{length}, {eps} and {condition_max}'
        )
    matrices = state_matrices(model)
    if not matrices:
        raise ValueError(
            f'{type(model).__name__} has no state matrix to verify'
        )
    places = {
        id(mixer.ssm.state_matrix): (mixer, norm)
        for mixer, norm in _mixers(model)
    }
    rows = Verification(
        row
        for name, matrix in matrices.items()
        for row in _verify(name, matrix, places.get(id(matrix)), length)
    )
    if strict:
        _check(rows, eps, condition_max)
    return rows


def _check(rows: Verification, eps: float, condition_max: float) -> None:
    """Raise StabilityError, naming the worst of each violation."""
    worst = max(rows, key=lambda row: row.abscissa)
    bad = [row for row in rows if not _decays(row.abscissa, eps)]
    if bad:
        raise StabilityError(
            f'{len(bad)} of {len(rows)} state matrices have a real part '
            f'above {-eps:g}, the largest {worst.abscissa:.4g} in '
            f'{worst.name}'
        )
    worst = max(rows, key=lambda row: row.condition)
    if not worst.condition <= condition_max:
        raise StabilityError(
            f'the eigenvectors of {worst.name} have a condition number of '
            f'{worst.condition:.4g}, more than {condition_max:g}'
        )


def _decays(abscissa: float, eps: float) -> bool:
    # float32 rounds a bound such as 0.01 itself
    return abscissa < 0 and abscissa <= -eps * (1 - 1e-6)


def _mixers(model: nn.Module) -> Iterator[tuple[MambaMixer, RMSNorm]]:
    """Find mixers behind a norm."""
    for block in model.modules():
        mixer = getattr(block, 'mixer', None)
        norm = getattr(block, 'norm', None)
        if isinstance(mixer, MambaMixer) and isinstance(norm, RMSNorm):
            yield mixer, norm


def _verify(
    name: str,
    matrix: StateMatrix,
    place: tuple[MambaMixer, RMSNorm] | None,
    length: float,
) -> Iterator[VerifiedMatrix]:
    """Verify each direction of a layer."""
    for parameter in matrix.parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f'{name} has a NaN or an infinity')
    values, condition = (matrix.by_direction(x) for x in _spectrum(matrix))
    kind = scan_kind(matrix)
    bounds = _certified(place, matrix)
    for k, (delta, drive) in enumerate(bounds):
        channels = matrix.d_inner // len(values[k])
        yield _verify_direction(
            direction_name(name, k, matrix.directions),
            kind,
            values[k].repeat_interleave(channels, 0),
            condition[k].repeat_interleave(channels, 0),
            delta,
            drive,
            length,
        )


def _verify_direction(
    name: str,
    kind: str,
    values: Tensor,
    condition: Tensor,
    delta: Tensor,
    drive: Tensor,
    length: float,
) -> VerifiedMatrix:
    abscissa = values.real.amax(-1)  # (d_inner,)
    gain = state_gain_bound(condition, abscissa, delta, length)
    # an input that is zero drives nothing, however large the gain
    state = torch.where(drive == 0, 0.0, gain * drive)
    growth = growth_exponent_bound(delta, values.real, length)
    return VerifiedMatrix(
        name,
        kind,
        float(abscissa.amax()),
        float(values.abs().amax()),
        float(condition.amax()),
        float(delta.amax()),
        float(growth),
        float(gain.amax()),
        float(state.amax()),
    )


@torch.no_grad()
def scan_kind(matrix: StateMatrix) -> str:
    """Name the arithmetic in which the scan runs with a state matrix.

    Args:
        matrix (StateMatrix): Finite.

    Returns:
        str: ``'real'``, or one of
        ``mmstabvim.stability.state.eigenbasis.KINDS``, without regard to
        gradients.
    """
    basis = matrix.eigenbasis()
    if isinstance(matrix.parametrization, Full) and basis is not None:
        kinds = basis.kind(matrix.parametrization.kappa_max)
        return KINDS[int(kinds.amax())]
    return KINDS[0] if matrix.eigenvalues().is_complex() else REAL


def _spectrum(matrix: StateMatrix) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (rows, N) and condition numbers (rows,), float64."""
    basis = matrix.eigenbasis()
    if basis is not None:
        return basis.eigenvalues, basis.condition
    values = matrix.eigenvalues().cpu()
    wide = torch.complex128 if values.is_complex() else torch.float64
    return values.to(wide), matrix.condition().double().cpu()


def _certified(
    place: tuple[MambaMixer, RMSNorm] | None, matrix: StateMatrix
) -> Iterator[tuple[Tensor, Tensor]]:
    """Bound step size and ``|u| ||B||`` of each direction, (d_inner,) each."""
    if place is None:
        unknown = torch.full((matrix.d_inner,), torch.inf).double()
        yield from [(unknown, unknown)] * matrix.directions
        return
    bias = matrix.input_bias
    for k, ranges in enumerate(certify_mixer(*place, None).directions):
        size = ranges['B'].norm()
        if bias is not None:
            value = matrix.by_direction(bias.value)[k]
            size = size + value.double().norm().cpu()
        yield ranges['delta'], ranges['u'] * size
