"""Check that a model's state matrices are stable, and what follows from it."""

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mmstabvim.layers.mamba_mixer import MambaMixer
from mmstabvim.layers.mixer_ranges import certify_mixer
from mmstabvim.layers.rms_norm import RMSNorm
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.layers.state_matrix import (
    FullStateMatrix,
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
    """What holds for the state matrices of one direction of one layer.

    Each number is the worst of its matrices.
    """

    name: str
    """Of the state matrix in the model."""
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
        >>> model = VisionMamba(dict(embed_dims=16, num_layers=2))
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
    places = {id(d.state_matrix): place for *place, d in _directions(model)}
    rows = Verification(
        _verify(name, matrix, places.get(id(matrix)), length)
        for name, matrix in matrices.items()
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


def _directions(
    model: nn.Module,
) -> Iterator[tuple[MambaMixer, nn.Module, int, SelectiveSSM]]:
    """Directions of mixers behind a norm: mixer, norm, number, direction."""
    for block in model.modules():
        mixer = getattr(block, 'mixer', None)
        norm = getattr(block, 'norm', None)
        if isinstance(mixer, MambaMixer) and isinstance(norm, RMSNorm):
            for k, direction in enumerate(mixer.directions):
                yield mixer, norm, k, cast(SelectiveSSM, direction)


def _verify(
    name: str, matrix: StateMatrix, place: list | None, length: float
) -> VerifiedMatrix:
    for parameter in matrix.parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f'{name} has a NaN or an infinity')
    values, condition = _spectrum(matrix)
    channels = matrix.d_inner // len(values)
    values = values.repeat_interleave(channels, 0)
    condition = condition.expand(len(values) // channels)
    condition = condition.repeat_interleave(channels, 0)
    abscissa = values.real.amax(-1)  # (d_inner,)
    delta, drive = _certified(place, len(values))
    gain = state_gain_bound(condition, abscissa, delta, length)
    # an input that is zero drives nothing, however large the gain
    state = torch.where(drive == 0, 0.0, gain * drive)
    growth = growth_exponent_bound(delta, values.real, length)
    return VerifiedMatrix(
        name,
        scan_kind(matrix),
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
    if isinstance(matrix, FullStateMatrix):
        kinds = matrix.eigenbasis().kind(matrix.kappa_max)
        return KINDS[int(kinds.amax())]
    return KINDS[0] if matrix.eigenvalues().is_complex() else REAL


def _spectrum(matrix: StateMatrix) -> tuple[Tensor, Tensor]:
    """Eigenvalues (rows, N) and condition numbers, in double precision."""
    if isinstance(matrix, FullStateMatrix):
        basis = matrix.eigenbasis()
        return basis.eigenvalues, basis.condition
    values = matrix.eigenvalues().cpu()
    wide = torch.complex128 if values.is_complex() else torch.float64
    return values.to(wide), matrix.condition().double().cpu()[None]


def _certified(place: list | None, d_inner: int) -> tuple[Tensor, Tensor]:
    """Bounds of the step size and of ``|u| ||B||``, (d_inner,) each."""
    if place is None:
        unknown = torch.full((d_inner,), torch.inf).double()
        return unknown, unknown
    mixer, norm, number = place
    ranges = certify_mixer(mixer, norm, None).directions[number]
    matrix = cast(SelectiveSSM, mixer.directions[number]).state_matrix
    size = ranges['B'].norm()
    bias = getattr(matrix, 'input_bias', None)
    if bias is not None:
        size = size + bias.value.double().norm().cpu()
    return ranges['delta'], ranges['u'] * size
