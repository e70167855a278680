"""Full state matrices: block-diagonal plus low rank."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmstabvim.layers.state_matrix.block_low_rank import BlockLowRank
from mmstabvim.layers.state_matrix.parametrization import (
    Obeying,
    Parametrization,
    ScanMatrices,
)
from mmstabvim.layers.state_matrix.projection import (
    bounds_of,
    project,
)
from mmstabvim.layers.state_matrix.rules import (
    EigenvalueClamping,
    Rule,
    SpectralNormalization,
)
from mmstabvim.log import print_log
from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.state.clamping import straight_through
from mmstabvim.stability.state.eigenbasis import (
    COMPLEX128,
    EXPONENTIAL,
    Eigenbasis,
    decompose,
    known_eig,
)
from mmstabvim.stability.state.normalization import (
    abscissa_shift,
    radius_scale,
)
from mmstabvim.stability.state.spectra import (
    gelfand_bound,
    known_eigenvalues,
    spectral_abscissa,
    spectral_radius,
)

ON_DEFECTIVE = ('exponential', 'raise')


class Full(Parametrization[BlockLowRank]):
    """Matrices ``blkdiag(A_1, ..., A_b) + U V^T``, shared by channel groups.

    The step size multiplies the whole matrix, so all ``exp(delta A)`` share
    one eigenbasis, in which the scan is diagonal: B and C change basis, and
    nothing of A is dropped or perturbed. Up to a condition number of
    ``kappa_max`` the scan runs in complex64, up to 1e11 in complex128, and
    above with the matrix exponential; where the gradient is wanted, a small
    distance of two eigenvalues asks for the next one too. A layer runs as the
    worst of its matrices needs.

    The last decomposition and the last projection are kept, and used again
    while the parameters have the same values.

    Args:
        d_inner (int): Channels of a direction.
        low_rank (bool): There is a low-rank term. Defaults to True.
        kappa_max (float): Condition number of the eigenbasis up to which it
            is used in complex64, and that clamping keeps. Defaults to 1e3.
        on_defective (str): ``'exponential'`` or ``'raise'``. Defaults to
            ``'exponential'``.
        directions (int): Directions of the layer. Defaults to 1.

    Raises:
        ValueError: If an argument is out of range.

    Source: arXiv:2111.00396 for diagonal plus low rank; docs/stabilizers.md.
    """

    granularities = ('channel', 'layer', 'block')

    def __init__(
        self,
        d_inner: int,
        low_rank: bool = True,
        kappa_max: float = 1e3,
        on_defective: str = 'exponential',
        directions: int = 1,
    ) -> None:
        super().__init__(directions)
        check_choice('on_defective', on_defective, ON_DEFECTIVE)
        if not kappa_max >= 1:
            raise ValueError(
                f'kappa_max must be at least 1, got {kappa_max!r}'
            )
        self.d_inner, self.kappa_max = d_inner, kappa_max
        self.on_defective = on_defective
        self.names = ('blocks', 'U', 'V') if low_rank else ('blocks',)
        self._decomposed: _Decomposed | None = None
        self._projected: _Projected | None = None

    def options(self) -> dict[str, Any]:
        """Options of the parametrization, to be shown."""
        return dict(kappa_max=self.kappa_max, **super().options())

    def pack(self, tensors: Sequence[Tensor]) -> BlockLowRank:
        """Name the parameters; without low rank U and V are empty."""
        blocks, *factors = tensors
        if not factors:
            size = blocks.shape[-3] * blocks.shape[-1]
            factors = [blocks.new_zeros(len(blocks), size, 0)] * 2
        return BlockLowRank(blocks, *factors)

    def fresh(self) -> Full:
        """Copy it without decomposition and projection."""
        twin = copy.copy(self)
        twin._decomposed = twin._projected = None
        return twin

    # ------------------------------------------------------- decompositions

    def eigenvalues(self, params: BlockLowRank) -> Tensor:
        """Compute the eigenvalues, complex, (rows, d_state), 1/step."""
        wide = _dense64(params)
        values = known_eigenvalues(wide.cpu(), self.eigenbasis(wide))
        return values.to(wide.device, _complex_dtype(params))

    def condition(self, params: BlockLowRank) -> Tensor:
        """Compute condition numbers of the eigenvectors, (rows,), >= 1."""
        return self.basis(params).condition

    @torch.no_grad()
    def basis(self, params: BlockLowRank) -> Eigenbasis:
        """Decompose the matrices of these parameters, on the CPU."""
        return self.eigenbasis(_dense64(params))

    def eigenbasis(self, wide: Tensor) -> Eigenbasis:
        """Decompose once for each value of the parameters.

        Args:
            wide (Tensor): (rows, d_state, d_state), float64, 1/step.
        """
        known = self._decomposed
        if known is None or not torch.equal(known.dense, wide):
            known = _Decomposed(wide.detach(), decompose(wide.detach()))
            self._decomposed = known
        return known.basis

    def scan_matrices(
        self, params: BlockLowRank, B: Tensor, C: Tensor
    ) -> ScanMatrices | None:
        """Return all N modes of the real matrix, so half of C.

        In the precision that the eigenbases need; None where they cannot be
        used.
        """
        wide = _dense64(params)
        basis = self.eigenbasis(wide)
        gradient = torch.is_grad_enabled() and wide.requires_grad
        kind = self._kind(basis, gradient)
        if kind == EXPONENTIAL:
            return None
        known = basis.separated() if gradient else basis.eigenvalues
        values, vectors = known_eig(wide.cpu(), known, basis.vectors)
        narrow = _complex_dtype(params)
        if kind == COMPLEX128:
            narrow = torch.complex128
        inverse = torch.linalg.inv(vectors)
        values, vectors, inverse = (
            self.split(x.to(wide.device, narrow))
            for x in (values, vectors, inverse)
        )
        channels = self.d_inner // values.shape[1]
        return ScanMatrices(
            values.repeat_interleave(channels, 1),
            torch.einsum('kblm,kgnm->kblgn', B.to(narrow), inverse),
            torch.einsum('kblm,kgmn->kblgn', C.to(narrow), vectors / 2),
        )

    def _kind(self, basis: Eigenbasis, gradient: bool) -> int:
        """Choose the arithmetic that the worst of the matrices needs."""
        kind = int(basis.kind(self.kappa_max, gradient).amax())
        if kind == EXPONENTIAL:
            found = (
                'a full state matrix has eigenvectors of condition number '
                f'{float(basis.condition.amax()):.1e}, too large even for '
                + ('the gradient in complex128' if gradient else 'complex128')
            )
            if self.on_defective == 'raise':
                raise RuntimeError(
                    f"{found}, and on_defective is 'raise': use "
                    'EigenvalueClampingHook, which keeps the condition number'
                )
            _say_exponential(found)
        return kind

    # ---------------------------------------------------------------- rules

    def project(
        self,
        params: BlockLowRank,
        rules: Sequence[Rule],
        dtype: torch.dtype | None = None,
        name: str = '',
    ) -> Obeying[BlockLowRank]:
        """Return parameters that obey rules together, checked as stored.

        The gradient is that of scale and shift.
        """
        dtype = params.blocks.dtype if dtype is None else dtype
        hard = self._project(params, tuple(rules), dtype, name)
        if not (torch.is_grad_enabled() and params.blocks.requires_grad):
            return hard
        soft = params
        for rule in rules:
            soft = self.obey(soft, rule)
        pairs = zip(soft, hard.params, strict=True)
        through = [straight_through(s, h.to(s.dtype)) for s, h in pairs]
        return Obeying(self.pack(through), hard.report)

    @torch.no_grad()
    def _project(
        self,
        params: BlockLowRank,
        rules: tuple[Rule, ...],
        dtype: torch.dtype,
        name: str,
    ) -> Obeying[BlockLowRank]:
        known = self._projected
        if known is not None and known.is_of(params, rules, dtype):
            return known.result
        outcome = project(
            params,
            bounds_of(rules, self.kappa_max, self.directions),
            dtype,
            self.basis(params),
            name,
        )
        result = params  # the same bits
        if outcome.moved.any():
            device = params.blocks.device
            result = BlockLowRank(*(x.to(device) for x in outcome.params))
            # one decomposition serves projection, check, scan and loss
            self._decomposed = _Decomposed(_dense64(result), outcome.basis)
        report = dict(
            projected_matrices=self.split(outcome.moved).sum(1),
            blend=self.split(outcome.blend).amax(1),
            fit_residual=self.split(outcome.residual).amax(1),
        )
        given = tuple(p.detach().clone() for p in params)
        obeying = Obeying(result, report)
        self._projected = _Projected(given, rules, dtype, obeying)
        return obeying

    def check_reparametrizations(self, rules: Sequence[Rule]) -> None:
        """Refuse rules whose result has no blocks and low rank."""
        super().check_reparametrizations(rules)
        for rule in rules:
            method = getattr(rule, 'method', None)
            if method not in (None, 'shift'):
                raise ValueError(
                    f'clamping by method {method!r} is fitted to blocks and '
                    'low rank, which has no gradient: use '
                    "method='shift' with mode='reparam'"
                )

    # -------------------------------------------------------------- algebra

    def dense(self, params: BlockLowRank) -> Tensor:
        """Compute the matrices (rows, d_state, d_state), 1/step."""
        return params.dense()

    def magnitude(self, params: BlockLowRank) -> Tensor:
        """Compute the norms of the matrices, (rows,), 1/step."""
        return torch.linalg.matrix_norm(params.dense().detach())

    def radius(self, params: BlockLowRank, radius: str = 'exact') -> Tensor:
        """Compute spectral radii, or Gelfand's bounds, (rows,), 1/step."""
        dense = params.dense()
        exact = radius == 'exact'
        return spectral_radius(dense) if exact else gelfand_bound(dense)

    def abscissa(self, params: BlockLowRank) -> Tensor:
        """Compute the largest real parts, (rows,), 1/step."""
        return spectral_abscissa(params.dense())

    def scale(self, params: BlockLowRank, divisor: Tensor) -> BlockLowRank:
        """Return blocks / c, and U and V / sqrt(c)."""
        return params.scaled(divisor)

    def shift(self, params: BlockLowRank, shift: Tensor) -> BlockLowRank:
        """Move the diagonals of the blocks; U and V stay."""
        return params.shifted(shift)

    def normalize(
        self, params: BlockLowRank, rule: SpectralNormalization
    ) -> BlockLowRank:
        """Scale each matrix, or each block and U V^T by itself."""
        if rule.granularity != 'block':
            return super().normalize(params, rule)
        rho_max = rule.rho_max
        if isinstance(rho_max, Tensor):
            rho_max = rho_max[:, None]
        blocks, U, V = params
        find = spectral_radius if rule.radius == 'exact' else gelfand_bound
        detach = rule.detach_scale
        divisor = radius_scale(find(blocks), rho_max, detach=detach)
        blocks = blocks / divisor[..., None, None]
        if U.shape[-1]:
            # U V^T has the nonzero eigenvalues of V^T U
            radius = find(V.mT @ U)[:, None]
            divisor = radius_scale(radius, rho_max, detach=detach)
            root = divisor.sqrt()[..., None]
            U, V = U / root, V / root
        return BlockLowRank(blocks, U, V)

    def clamp(
        self, params: BlockLowRank, rule: EigenvalueClamping
    ) -> BlockLowRank:
        """Move all eigenvalues of a matrix until the largest obeys."""
        abscissa = spectral_abscissa(params.dense())
        return params.shifted(abscissa_shift(abscissa, -rule.floor))


class _Decomposed(NamedTuple):
    """A decomposition and what was decomposed."""

    dense: Tensor  # (rows, d_state, d_state), float64
    basis: Eigenbasis


class _Projected(NamedTuple):
    """A projection and what was projected."""

    params: tuple[Tensor, ...]
    rules: tuple[Rule, ...]
    dtype: torch.dtype
    result: Obeying[BlockLowRank]

    def is_of(
        self,
        params: BlockLowRank,
        rules: tuple[Rule, ...],
        dtype: torch.dtype,
    ) -> bool:
        """Tell whether these were projected."""
        same = zip(self.params, params, strict=True)
        return (
            self.dtype == dtype
            and len(self.rules) == len(rules)
            and all(a is b for a, b in zip(self.rules, rules, strict=True))
            and all(torch.equal(a, b) for a, b in same)
        )


def _dense64(params: BlockLowRank) -> Tensor:
    """Assemble what is decomposed: (rows, d_state, d_state), float64."""
    return params.to(torch.float64).dense()


def _complex_dtype(params: BlockLowRank) -> torch.dtype:
    dtype = torch.promote_types(params.blocks.dtype, torch.float32)
    return dtype.to_complex()


@torch.no_grad()
def decompose_together(
    matrices: Iterable[tuple[Parametrization[Any], Any]],
) -> None:
    """Diagonalize full matrices in one batched call.

    Each parametrization keeps its part until its parameters change. On the
    CPU in float64: the matrices are small, and a GPU would wait for the host.

    Args:
        matrices (Iterable[tuple[Parametrization, Params]]): Parametrizations
            with parameters; others than full ones are left alone.
    """
    by_size: dict[int, list[tuple[Full, Tensor]]] = {}
    for parametrization, params in matrices:
        if isinstance(parametrization, Full):
            wide = _dense64(params)
            by_size.setdefault(len(wide[0]), []).append(
                (parametrization, wide)
            )
    for members in by_size.values():
        _decompose(members)


def _decompose(members: Sequence[tuple[Full, Tensor]]) -> None:
    together = torch.cat([wide for _, wide in members])
    known = [full._decomposed for full, _ in members]
    if all(known) and torch.equal(
        torch.cat([k.dense for k in known if k]), together
    ):
        return
    basis = decompose(together)
    sizes = [len(wide) for _, wide in members]
    parts = zip(*(x.split(sizes) for x in basis), strict=True)
    for (full, wide), part in zip(members, parts, strict=True):
        full._decomposed = _Decomposed(wide, Eigenbasis(*part))


@functools.cache
def _say_exponential(found: str) -> None:
    print_log(
        f'{found}: that layer runs with the matrix exponential, which is '
        'exact and hundreds of times slower. EigenvalueClampingHook keeps '
        "the condition number; on_defective='raise' stops instead",
        level=logging.WARNING,
    )
