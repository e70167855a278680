"""Block plus low-rank matrices under bounds: what is stored obeys them.

Every bound is checked on the numbers that are stored, in float64: a matrix is
projected, rounded to the precision of its parameters, and looked at again.
What no scale, shift or fit brings within its bounds is blended with a normal
matrix of the same structure that obeys all of them; see docs/stabilizers.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmstabvim.layers.state_matrix.block_low_rank import BlockLowRank
from mmstabvim.layers.state_matrix.rules import (
    EigenvalueClamping,
    Rule,
    SpectralNormalization,
    check_compatible,
    largest_in_direction,
)
from mmstabvim.stability.state.block_low_rank import fit_block_low_rank
from mmstabvim.stability.state.clamping import clamp_matrix
from mmstabvim.stability.state.eigenbasis import Eigenbasis, decompose
from mmstabvim.stability.state.spectra import gelfand_bound, spectral_radius

BAND = 1e-9
"""Excess of a real part, relative to the norm of the matrix, that another
build of LAPACK may see in a matrix that obeys here."""

RADIUS_SLACK = 1e-6
"""Relative excess of a spectral radius that is let through."""

PAIR_SLACK = 1e-3
"""The same where the real parts are bounded too."""

ROUNDS, PAIR_ROUNDS = 5, 25
"""Times that fit and shift, or scale and shift, are tried before the blend.
Scale and shift converge geometrically, by the ratio of both bounds."""

_BISECTIONS = 14


class Outcome(NamedTuple):
    """Result of a projection."""

    params: BlockLowRank
    """In the dtype that was asked for."""
    basis: Eigenbasis
    """Eigenbasis of ``params``, in float64."""
    moved: Tensor
    """(groups,), bool: which matrices changed."""
    blend: Tensor
    """(groups,), float64, in [0, 1]: s of the blend with a normal matrix."""
    residual: Tensor
    """(groups,), float64: of the last fit to the structure, relative."""


@dataclass(frozen=True)
class Bounds:
    """Bounds on block plus low-rank matrices.

    Args:
        ceiling (float): Largest real part of an eigenvalue, 1/step.
        floor (float): Smallest one.
        condition_max (float): Largest condition number of the eigenvectors.
        scalings (tuple): Continuous-time spectral normalizations.
        method (str): How real parts are moved: ``'shift'``, ``'eig'`` or
            ``'schur'``.
        share_shift (bool): All matrices of a direction are shifted alike.
        directions (int): Directions of the layer.
    """

    ceiling: float = math.inf
    floor: float = -math.inf
    condition_max: float = math.inf
    scalings: tuple[SpectralNormalization, ...] = ()
    method: str = 'shift'
    share_shift: bool = False
    directions: int = 1

    @property
    def share(self) -> bool:
        """All matrices of a direction move where one violates a bound."""
        layer = (rule.granularity == 'layer' for rule in self.scalings)
        return self.share_shift or any(layer)


def bounds_of(
    rules: Sequence[Rule], kappa_max: float, directions: int = 1
) -> Bounds:
    """Combine rules into bounds that hold together.

    Args:
        rules (Sequence[Rule]): In any order.
        kappa_max (float): Condition number that ``'auto'`` stands for.
        directions (int): Directions of the layer. Defaults to 1.

    Returns:
        Bounds: All at once.

    Raises:
        ValueError: If no matrix obeys all of them.
    """
    floor, ceiling = check_compatible(rules)
    normalizations = [r for r in rules if isinstance(r, SpectralNormalization)]
    clampings = [r for r in rules if isinstance(r, EigenvalueClamping)]
    conditions = [
        kappa_max if r.condition_max == 'auto' else float(r.condition_max)
        for r in clampings
        if r.condition_max is not None
    ]
    methods = [r.method for r in clampings if r.method not in (None, 'shift')]
    return Bounds(
        ceiling,
        floor,
        min(conditions, default=math.inf),
        tuple(
            _with_shared_radius(r, directions)
            for r in normalizations
            if r.domain == 'continuous'
        ),
        methods[0] or 'shift' if methods else 'shift',
        any(
            rule.domain == 'discrete' and rule.granularity == 'layer'
            for rule in normalizations
        ),
        directions,
    )


def _with_shared_radius(
    rule: SpectralNormalization, directions: int
) -> SpectralNormalization:
    """Share the largest bound within a direction where the scale is shared."""
    if rule.granularity != 'layer' or not isinstance(rule.rho_max, Tensor):
        return rule
    shared = largest_in_direction(rule.rho_max, directions)
    return replace(rule, rho_max=shared)


@torch.no_grad()
def project(
    params: BlockLowRank,
    bounds: Bounds,
    dtype: torch.dtype,
    basis: Eigenbasis | None = None,
    name: str = '',
) -> Outcome:
    """Move the matrices that violate a bound until what is stored obeys.

    A matrix that obeys stays bit by bit. Others are scaled and shifted (or
    clamped and fitted to the structure), and rounded, until they obey. What
    that does not bring within its bounds, an ill-conditioned matrix above
    all, is blended with a normal matrix that obeys, as far as needed.

    Args:
        params (BlockLowRank): As stored; widened is fine.
        bounds (Bounds): What to obey.
        dtype (torch.dtype): Real dtype that the result is stored in.
        basis (Eigenbasis, optional): Of ``params``, if it is known.
        name (str): Of the matrix, for errors.

    Returns:
        Outcome: On the CPU.

    Raises:
        ValueError: If a number is not finite, or the precision cannot hold
            the bound.
    """
    work = BlockLowRank(*(x.detach().double().cpu() for x in params))
    basis = decompose(work.dense()) if basis is None else basis
    groups = len(work.blocks)
    blend, residual = torch.zeros(2, groups, dtype=torch.float64)
    wrong = _violations(work, basis, bounds, strict=False)
    if bounds.share:
        wrong = largest_in_direction(wrong, bounds.directions)
    if not wrong.any():
        return Outcome(work.to(dtype), basis, wrong, blend, residual)
    _check_precision(work, bounds, dtype, wrong, basis, name)
    part, blend[wrong], residual[wrong] = _settle(
        work.at(wrong), _of_some(bounds, wrong), dtype
    )
    work = work.put(wrong, part)
    basis = decompose(work.dense())
    _check_result(work, basis, bounds, dtype, name)
    return Outcome(work.to(dtype), basis, wrong, blend, residual)


def _settle(
    params: BlockLowRank, bounds: Bounds, dtype: torch.dtype
) -> tuple[BlockLowRank, Tensor, Tensor]:
    """Move matrices until what is stored obeys.

    Returns:
        tuple[BlockLowRank, Tensor, Tensor]: Matrices that ``dtype`` holds,
        in float64; share of the blend and residual of the fit, (groups,).
    """
    residual = torch.zeros(len(params.blocks), dtype=torch.float64)
    todo = residual == 0
    for attempt in range(PAIR_ROUNDS if bounds.scalings else ROUNDS):
        moved, misfit = _move(params, bounds, dtype, attempt)
        params = params.put(todo, moved.at(todo).to(dtype).to(torch.float64))
        residual = torch.where(todo, misfit.maximum(residual), residual)
        basis = decompose(params.dense())
        todo = _violations(params, basis, bounds, strict=True)
        if bounds.share:
            todo = largest_in_direction(todo, bounds.directions)
        ill = ~(basis.condition <= _condition_limit(bounds, True))
        if not (todo & ~ill).any():
            break  # no scale or shift changes a condition number
    share = torch.zeros_like(residual)
    if todo.any():
        normal = normal_blocks(params, bounds, dtype)
        params, share = _blend(params, normal, bounds, dtype, todo)
    return params, share, residual


# ------------------------------------------------------------------- checks


def _violations(
    params: BlockLowRank, basis: Eigenbasis, bounds: Bounds, strict: bool
) -> Tensor:
    """Which matrices violate a bound, (groups,); strictly, or with a band."""
    real = basis.eigenvalues.real
    dense = params.dense()
    band = (0.0 if strict else BAND) * torch.linalg.matrix_norm(dense)
    if bounds.ceiling <= 0 and not strict:
        # never so wide that it reaches the border of stability
        band = torch.clamp(band, max=-bounds.ceiling / 2)
    highest = real.amax(-1)
    if strict and bounds.condition_max == math.inf:
        # of an ill-conditioned matrix two computations may differ
        highest = highest.maximum(torch.linalg.eigvals(dense).real.amax(-1))
    wrong = highest > bounds.ceiling + band
    wrong |= real.amin(-1) < bounds.floor - band
    wrong |= ~(basis.condition <= _condition_limit(bounds, strict))
    for rule in bounds.scalings:
        limit = _limit(rule, bounds, strict)
        wrong |= (_radius(params, basis, rule) > limit).any(-1)
    return wrong


def _condition_limit(bounds: Bounds, strict: bool) -> float:
    """Condition number that is let through.

    A projection leaves some room, so that not every step violates it again.
    """
    if strict:
        return 1 + 0.9 * (bounds.condition_max - 1) + 1e-9
    return bounds.condition_max * (1 + 1e-9)


def _limit(
    rule: SpectralNormalization, bounds: Bounds, strict: bool
) -> Tensor:
    """Radius that is let through, (groups or 1, 1).

    Beside a bound of the real part, which a scale undoes in part, a
    thousandth more, but no more than the distance of that bound from zero.
    """
    rho = _rho_max(rule)
    slack = RADIUS_SLACK * rho
    if -math.inf < bounds.ceiling < 0:
        slack = (PAIR_SLACK * rho).clamp(max=-bounds.ceiling).maximum(slack)
    return rho + slack * (0.5 if strict else 1.0)


def _rho_max(rule: SpectralNormalization) -> Tensor:
    """(groups or 1, 1), float64."""
    rho = torch.as_tensor(rule.rho_max, dtype=torch.float64).cpu()
    return rho.reshape(-1, 1)


def _radius(
    params: BlockLowRank, basis: Eigenbasis, rule: SpectralNormalization
) -> Tensor:
    """Compute the bounded radii: (groups, 1), or of K blocks and U V^T."""
    exact = rule.radius == 'exact'
    if rule.granularity != 'block':
        if exact:
            return basis.eigenvalues.abs().amax(-1, keepdim=True)
        return gelfand_bound(params.dense())[:, None]
    find = spectral_radius if exact else gelfand_bound
    radii = find(params.blocks)
    if not params.U.shape[-1]:
        return radii
    # U V^T has the nonzero eigenvalues of V^T U
    return torch.cat([radii, find(params.V.mT @ params.U)[:, None]], 1)


def _of_some(bounds: Bounds, index: Tensor) -> Bounds:
    """The bounds of some of the matrices; of whole directions if shared."""
    directions = index.unflatten(0, (bounds.directions, -1)).any(1).sum()
    return replace(
        bounds,
        directions=int(directions) if bounds.share else 1,
        scalings=tuple(
            replace(rule, rho_max=rule.rho_max.cpu()[index])
            if isinstance(rule.rho_max, Tensor)
            else rule
            for rule in bounds.scalings
        ),
    )


def _check_precision(
    params: BlockLowRank,
    bounds: Bounds,
    dtype: torch.dtype,
    wrong: Tensor,
    basis: Eigenbasis,
    name: str,
) -> None:
    """Raise where rounding moves eigenvalues across the whole margin.

    Not for halves as parameters, of which a few ulp are overshot instead.
    """
    margin = -bounds.ceiling
    if not 0 < margin < math.inf or dtype.itemsize < 4:
        return
    size = torch.linalg.matrix_norm(params.dense()) * wrong
    for rule in bounds.scalings:
        if rule.granularity != 'block':
            radius = basis.eigenvalues.abs().amax(-1)
            size = size / (radius / _rho_max(rule)[:, 0]).clamp(min=1.0)
    lost = float(size.amax()) * torch.finfo(dtype).eps / 2
    if lost >= margin / 2:
        raise ValueError(
            f'the state matrix {name or "of this layer"} cannot be kept at '
            f'real parts of at most {-margin:g}: with a norm of '
            f'{float(size.amax()):.3g} rounding to {dtype} moves its '
            f'eigenvalues by {lost:.3g}. Bound its spectral radius too '
            '(SpectralNormalizationHook), or ask for a larger eps'
        )


def _check_result(
    params: BlockLowRank,
    basis: Eigenbasis,
    bounds: Bounds,
    dtype: torch.dtype,
    name: str,
) -> None:
    """Raise where not even the normal matrix obeys once it is rounded."""
    wrong = _violations(params, basis, bounds, strict=False)
    if wrong.any():
        values, worst = basis.eigenvalues[wrong][0], basis.condition[wrong][0]
        raise ValueError(
            f'the state matrix {name or "of this layer"} cannot obey its '
            f'rules in {dtype}: real parts from {values.real.min():.4g} to '
            f'{values.real.max():.4g} for {bounds.floor:.4g} to '
            f'{bounds.ceiling:.4g}, a radius of {values.abs().max():.4g} and '
            f'a condition number of {worst:.4g}'
        )


# -------------------------------------------------------------------- moves


def _move(
    params: BlockLowRank, bounds: Bounds, dtype: torch.dtype, attempt: int
) -> tuple[BlockLowRank, Tensor]:
    """One round of scale, fit and shift, in float64.

    Returns:
        tuple[BlockLowRank, Tensor]: Moved matrices, and the residual of
        their fit, (groups,).
    """
    eps = torch.finfo(dtype).eps
    for rule in bounds.scalings:
        params = _scale(params, rule, bounds, attempt * eps)
    residual = torch.zeros(len(params.blocks), dtype=torch.float64)
    fits = bounds.method != 'shift' or bounds.floor > -math.inf
    if fits and attempt < 2:
        params, residual = _fit(params, bounds)
    if bounds.ceiling < math.inf:
        params = _shift(params, bounds, eps)
    return params, residual


def _scale(
    params: BlockLowRank,
    rule: SpectralNormalization,
    bounds: Bounds,
    extra: float,
) -> BlockLowRank:
    basis = decompose(params.dense())
    radius, rho = _radius(params, basis, rule), _rho_max(rule)
    if rule.granularity == 'layer':
        radius = largest_in_direction(radius, bounds.directions)
    above = radius > _limit(rule, bounds, strict=True)
    scale = torch.where(above, radius / rho * (1 + extra), 1.0)
    if rule.granularity != 'block':
        return params.scaled(scale[:, 0])
    blocks = scale[:, : params.blocks.shape[1], None, None]
    if not params.U.shape[-1]:
        return params._replace(blocks=params.blocks / blocks)
    root = scale[:, -1, None, None].sqrt()
    return BlockLowRank(
        params.blocks / blocks, params.U / root, params.V / root
    )


def _fit(params: BlockLowRank, bounds: Bounds) -> tuple[BlockLowRank, Tensor]:
    """Blocks and low rank nearest to the clamped violating matrices."""
    dense = params.dense()
    method = 'eig' if bounds.method == 'eig' else 'schur'
    lambda_max = None if bounds.floor == -math.inf else -bounds.floor
    target = clamp_matrix(dense, -bounds.ceiling, lambda_max, method)
    wrong = (target != dense).flatten(1).any(1)
    residual = torch.zeros(len(dense), dtype=torch.float64)
    if not wrong.any():
        return params, residual
    size, rank = params.blocks.shape[-1], params.U.shape[-1]
    start = (params.U[wrong], params.V[wrong]) if rank else None
    *fitted, misfit = fit_block_low_rank(
        target[wrong], size, rank, start=start
    )
    residual[wrong] = misfit
    return params.put(wrong, BlockLowRank(*fitted)), residual


def _shift(params: BlockLowRank, bounds: Bounds, eps: float) -> BlockLowRank:
    """Move all eigenvalues of a matrix until the largest obeys."""
    dense = params.dense()
    highest = torch.linalg.eig(dense)[0].real.amax(-1)
    if bounds.condition_max == math.inf:
        highest = highest.maximum(torch.linalg.eigvals(dense).real.amax(-1))
    excess = highest - bounds.ceiling
    if bounds.share_shift:
        excess = largest_in_direction(excess, bounds.directions)
    diagonal = params.blocks.diagonal(dim1=-2, dim2=-1).abs()
    rounding = 4 * eps * diagonal.flatten(1).amax(-1)
    return params.shifted(torch.where(excess > 0, excess + rounding, 0.0))


def _smallest(fits: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Smallest share in [0, 1] that was seen to fit, by bisection."""
    low = torch.zeros(count, dtype=torch.float64)
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        good = fits(middle)
        low = torch.where(good, low, middle)
        high = torch.where(good, middle, high)
    return high


def _blend(
    params: BlockLowRank,
    normal: Tensor,
    bounds: Bounds,
    dtype: torch.dtype,
    todo: Tensor,
) -> tuple[BlockLowRank, Tensor]:
    """Blend with a matrix that obeys until what is stored obeys."""

    def stored(s: Tensor) -> BlockLowRank:
        return params.blended(normal, s).to(dtype).to(torch.float64)

    def fits(s: Tensor) -> Tensor:
        found = stored(s)
        basis = decompose(found.dense())
        return ~_violations(found, basis, bounds, strict=True)

    share = torch.where(todo, _smallest(fits, len(todo)), 0.0)
    return stored(share), share


# ------------------------------------------------------- the normal matrix


def normal_blocks(
    params: BlockLowRank, bounds: Bounds, dtype: torch.dtype
) -> Tensor:
    """Blocks of a normal matrix near A that obeys all bounds.

    A 2 x 2 block that turns more than it shears is made a rotation, with the
    mean of its diagonal; else, as for every other size, the diagonal of A is
    kept. Equal entries are spread downward, since on the way to a matrix with
    equal eigenvalues every matrix would be defective.

    Args:
        params (BlockLowRank): A, float64.
        bounds (Bounds): On real parts and radii.
        dtype (torch.dtype): That will store the blocks.

    Returns:
        Tensor: (groups, K, b, b), float64, 1/step.
    """
    size = params.blocks.shape[-1]
    dense = params.dense()
    own = dense.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    own = own.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (groups, K, b, b)
    real = own.diagonal(dim1=-2, dim2=-1)  # (groups, K, b)
    turn = torch.zeros_like(real[..., 0])
    if size == 2:
        turn = (own[..., 0, 1] - own[..., 1, 0]) / 2
        turns = turn.abs() > (real[..., 0] - real[..., 1]).abs() / 2
        turn = torch.where(turns, turn, 0.0)
        mean = real.mean(-1, keepdim=True).expand_as(real)
        real = torch.where(turns[..., None], mean, real)
    real = _spread(real, turn, dense, bounds, dtype)
    turn = turn.sign() * turn.abs().minimum(
        _height(real[..., 0], bounds, dtype)
    )
    blocks = torch.diag_embed(real)
    if size == 2:
        blocks[..., 0, 1] += turn
        blocks[..., 1, 0] -= turn
    return blocks


def _spread(
    real: Tensor,
    turn: Tensor,
    dense: Tensor,
    bounds: Bounds,
    dtype: torch.dtype,
) -> Tensor:
    """Clamp real parts (groups, K, b) to their bounds, and move them apart."""
    eps = 8 * torch.finfo(dtype).eps
    high, low = (
        x if math.isinf(x) else x + sign * eps * abs(x)
        for x, sign in ((bounds.ceiling, -1), (bounds.floor, 1))
    )
    lowest = torch.full_like(real[..., :1], low)
    for rule in bounds.scalings:
        rho = _modulus(rule, bounds, real.shape[1] * real.shape[2], dtype)
        lowest = lowest.maximum(-rho[..., None].to(lowest))
    K, size = real.shape[1:]
    # the diagonal entry's place; a rotation's two entries share theirs
    place = torch.arange(K * size, dtype=real.dtype).view(K, size)
    place = torch.where((turn != 0)[..., None], place[:, :1], place)
    gap = _SPREAD * torch.linalg.matrix_norm(dense)[:, None, None] / (K * size)
    spread = real.clamp(max=high) - place * gap
    inside = spread.maximum(lowest).clamp(max=high)
    return inside


_SPREAD = 0.1
"""Shift of the last diagonal entry, relative to the norm of A."""


def _modulus(
    rule: SpectralNormalization,
    bounds: Bounds,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Radius that a normal matrix may have under a rule, (groups or 1, 1)."""
    rho = _rho_max(rule) * (1 - 4 * torch.finfo(dtype).eps)
    if rule.radius == 'gelfand':
        rho = rho * size ** (-0.5 / 1024)
    return rho.clamp(min=max(-bounds.ceiling, 0.0) if bounds.scalings else 0)


def _height(real: Tensor, bounds: Bounds, dtype: torch.dtype) -> Tensor:
    """Largest imaginary part beside these real parts, (groups, K)."""
    height = torch.full_like(real, torch.inf)
    for rule in bounds.scalings:
        rho = _modulus(rule, bounds, 2 * real.shape[1], dtype).to(real)
        height = height.minimum((rho**2 - real**2).clamp(min=0.0).sqrt())
    return height
