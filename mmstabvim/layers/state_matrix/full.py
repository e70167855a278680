"""Full state matrices: block-diagonal plus low rank."""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmstabvim.layers.state_matrix.base import (
    Params,
    ScanMatrices,
    StateMatrix,
    autocast_off,
)
from mmstabvim.layers.state_matrix.block_low_rank import BlockLowRank
from mmstabvim.layers.state_matrix.constraints import (
    Constraint,
    EigenvalueClamping,
    SpectralNormalization,
)
from mmstabvim.layers.state_matrix.initialization import (
    check_init,
    full_start,
)
from mmstabvim.layers.state_matrix.projection import (
    Outcome,
    bounds_of,
    project,
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
from mmstabvim.stability.state.perturbation import Perturbation
from mmstabvim.stability.state.spectra import (
    eigenvalues,
    gelfand_bound,
    known_eigenvalues,
    spectral_abscissa,
    spectral_radius,
)

ON_DEFECTIVE = ('exponential', 'raise')


class FullStateMatrix(StateMatrix):
    """Matrices ``blkdiag(A_1, ..., A_K) + U V^T``, shared by channel groups.

    The step size multiplies the whole matrix, so all ``exp(delta A)`` share
    one eigenbasis, in which the scan is diagonal: B and C change basis, and
    nothing of A is dropped or perturbed. Up to a condition number of
    ``kappa_max`` the scan runs in complex64, up to 1e11 in complex128, and
    above with the matrix exponential; where the gradient is wanted, a small
    distance of two eigenvalues asks for the next one too.

    Initialized to ``-diag(1, ..., N)`` with ``U = 0`` and a small random V;
    other initializations are blocks too, HiPPO-LegS and PTD in a rotated
    basis with ``-p p^T`` in the low-rank term.

    Args:
        d_inner (int): Channels.
        d_state (int): Size N of each matrix.
        block_size (int): Size b of a block, a divisor of d_state. Defaults
            to 2.
        rank (int): Rank r of the low-rank term; 0 leaves it out. Defaults to
            1.
        groups (int): Number of matrices G, a divisor of d_inner; d_inner
            gives every channel its own. Decompositions and the memory of the
            scan grow with it. Defaults to 1.
        kappa_max (float): Condition number of the eigenbasis up to which it
            is used in complex64, and that clamping keeps. Defaults to 1e3.
        init (str): ``'s4d_real'``, ``'s4d_lin'``, ``'s4d_inv'``,
            ``'s4d_legs'``, ``'hippo'`` or ``'ptd'``. Defaults to
            ``'s4d_real'``.
        ptd (Perturbation, optional): How ``'ptd'`` perturbs the blocks; in
            configs its fields are options such as ``ptd_norm=0.4``. Defaults
            to None, for its defaults.
        on_defective (str): What a scan does with a matrix whose eigenvectors
            even complex128 cannot use: ``'exponential'`` runs it with the
            matrix exponential, exact and very slow; ``'raise'`` stops.
            Defaults to ``'exponential'``.

    Raises:
        ValueError: If a size does not divide or is out of range, or the
            structure cannot hold the initialization.

    Source: arXiv:2111.00396 for diagonal plus low rank; arXiv:2310.01698 for
    the perturbation.
    """

    granularities = ('channel', 'layer', 'block')

    projection: Outcome | None = None
    """What the last projection did."""

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        block_size: int = 2,
        rank: int = 1,
        groups: int = 1,
        kappa_max: float = 1e3,
        init: str = 's4d_real',
        ptd: Perturbation | None = None,
        on_defective: str = 'exponential',
    ) -> None:
        super().__init__(d_inner, d_state)
        check_choice('on_defective', on_defective, ON_DEFECTIVE)
        _check_divides('block_size', block_size, 'd_state', d_state)
        _check_divides('groups', groups, 'd_inner', d_inner)
        if not 0 <= rank <= d_state:
            raise ValueError(
                f'rank must be from 0 to d_state = {d_state}, got {rank!r}'
            )
        if not kappa_max >= 1:
            raise ValueError(
                f'kappa_max must be at least 1, got {kappa_max!r}'
            )
        self.block_size, self.rank, self.groups = block_size, rank, groups
        self.kappa_max, self.on_defective = kappa_max, on_defective
        check_init(init, 'full')
        start = full_start(init, d_state, block_size, rank, kappa_max, ptd)
        blocks = start.blocks.to(torch.get_default_device(), torch.float32)
        self.blocks = nn.Parameter(blocks.repeat(groups, 1, 1, 1))
        if rank:
            self.U = nn.Parameter(torch.zeros(groups, d_state, rank))
            # U moves first: its gradient is proportional to V
            self.V = nn.Parameter(
                0.1 * d_state**-0.5 * torch.randn(groups, d_state, rank)
            )
        if start.rank_one is not None:
            with torch.no_grad():
                self.U[..., 0].copy_(-start.rank_one)
                self.V[..., 0].copy_(start.rank_one)
        self._known: _Known | None = None
        self._obeying: _Obeying | None = None

    # ------------------------------------------- what the forward pass uses

    def eigenvalues(self) -> Tensor:
        """Eigenvalues in use, (groups, d_state), complex, 1/step."""
        return self._eigenvalues(self.effective())

    def raw_eigenvalues(self) -> Tensor:
        """Eigenvalues of the raw parameters, (groups, d_state)."""
        return self._eigenvalues(self.raw())

    def _eigenvalues(self, params: Params) -> Tensor:
        with autocast_off(self):
            wide = self._wide(params)
            values = known_eigenvalues(wide.cpu(), self.eigenbasis_of(wide))
            dtype = torch.promote_types(params[0].dtype, torch.float32)
            return values.to(wide.device, dtype.to_complex())

    def condition(self) -> Tensor:
        """Largest condition number of the eigenbases in use, a scalar."""
        return self.eigenbasis().condition.amax()

    @torch.no_grad()
    def eigenbasis(self) -> Eigenbasis:
        """Eigenbasis of the matrices in use, on the CPU."""
        with autocast_off(self):
            return self.eigenbasis_of(self._wide(self.effective()))

    def scan_matrices(self, B: Tensor, C: Tensor) -> ScanMatrices | None:
        """All N modes of the real matrix, so half of C: the scan doubles.

        In the precision that the eigenbases need; None where they cannot be
        used.
        """
        with autocast_off(self):
            params = self.effective()
            wide = self._wide(params)
            basis = self.eigenbasis_of(wide)
            gradient = torch.is_grad_enabled() and wide.requires_grad
            kind = self._kind(basis, gradient)
            if kind == EXPONENTIAL:
                return None
            known = basis.separated() if gradient else basis.eigenvalues
            values, vectors = known_eig(wide.cpu(), known, basis.vectors)
            dtype = torch.promote_types(params[0].dtype, torch.float32)
            narrow = dtype.to_complex()
            if kind == COMPLEX128:
                narrow = torch.complex128
            inverse = torch.linalg.inv(vectors).to(wide.device, narrow)
            vectors = vectors.to(wide.device, narrow)
            values = values.to(wide.device, narrow)
            channels = self.d_inner // self.groups
            return ScanMatrices(
                values.repeat_interleave(channels, 0),
                torch.einsum('blm,gnm->blgn', B.to(narrow), inverse),
                torch.einsum('blm,gmn->blgn', C.to(narrow), vectors / 2),
            )

    def _kind(self, basis: Eigenbasis, gradient: bool) -> int:
        """How the scan runs: as the worst of the matrices needs."""
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

    def eigenbasis_of(self, wide: Tensor) -> Eigenbasis:
        """Decompose once for each value of the parameters.

        Args:
            wide (Tensor): (groups, d_state, d_state), float64, 1/step.
        """
        known = self._known
        if known is None or not torch.equal(known.dense, wide):
            known = _Known(wide.detach(), decompose(wide.detach()))
            self._known = known
        return known.basis

    def _wide(self, params: Params) -> Tensor:
        """What is decomposed: (groups, d_state, d_state), float64."""
        return self.dense_of(tuple(p.double() for p in params))

    # ----------------------------------------------------- rules

    def obeying(
        self,
        params: Params,
        rules: Sequence[Constraint],
        dtype: torch.dtype | None = None,
        name: str = '',
    ) -> Params:
        """Parameters that obey rules together, checked as they are stored.

        The gradient is that of scale and shift.
        """
        if not rules:
            return params
        dtype = params[0].dtype if dtype is None else dtype
        hard = self._projected(params, tuple(rules), dtype, name)
        if not (torch.is_grad_enabled() and params[0].requires_grad):
            return hard
        soft = params
        for rule in rules:
            soft = rule(self, soft)
        pairs = zip(soft, hard, strict=True)
        return tuple(straight_through(s, h.to(s.dtype)) for s, h in pairs)

    @torch.no_grad()
    def _projected(
        self,
        params: Params,
        rules: tuple[Constraint, ...],
        dtype: torch.dtype,
        name: str,
    ) -> Params:
        known = self._obeying
        if known is not None and known.is_of(params, rules, dtype):
            return known.result
        outcome = project(
            self._structured(params),
            bounds_of(rules, self.kappa_max),
            dtype,
            self.eigenbasis_of(self._wide(params)),
            name,
        )
        self.projection = outcome
        device = params[0].device
        result = tuple(x.to(device) for x in outcome.params[: len(params)])
        if not outcome.moved.any():
            result = params  # the same bits
        else:
            wide = self._wide(result)
            # one decomposition serves projection, check, scan and loss
            self._known = _Known(wide, outcome.basis)
        given = tuple(p.detach().clone() for p in params)
        self._obeying = _Obeying(given, rules, dtype, result)
        return result

    def check_reparametrizations(self, name: str = '') -> None:
        """Refuse rules whose result has no blocks and low rank."""
        super().check_reparametrizations(name)
        for rule in self.reparametrizations:
            method = getattr(rule, 'method', None)
            if method not in (None, 'shift'):
                raise ValueError(
                    f'{name or "this matrix"}: clamping by method {method!r} '
                    'is fitted to blocks and low rank, which has no gradient: '
                    "use method='shift' with mode='reparam'"
                )

    def _structured(self, params: Params) -> BlockLowRank:
        blocks, *factors = params
        if not factors:
            factors = [blocks.new_zeros(self.groups, self.d_state, 0)] * 2
        return BlockLowRank(blocks, *factors)

    # ----------------------------------------------------- parametrization

    def dense_of(self, params: Params) -> Tensor:
        """Matrices (groups, d_state, d_state), 1/step."""
        return self._structured(params).dense()

    def eigenvalues_of(self, params: Params) -> Tensor:
        """Complex, (groups, d_state), float64 inside."""
        values = eigenvalues(self._wide(params))
        dtype = torch.promote_types(params[0].dtype, torch.float32)
        return values.to(params[0].device, dtype.to_complex())

    def magnitude_of(self, params: Params) -> Tensor:
        """Of the whole matrix, (groups,), 1/step."""
        return torch.linalg.matrix_norm(self.dense_of(params).detach())

    def radius_of(self, params: Params, radius: str) -> Tensor:
        """Exact, or Gelfand's bound, (groups,), 1/step."""
        dense = self.dense_of(params)
        exact = radius == 'exact'
        return spectral_radius(dense) if exact else gelfand_bound(dense)

    def scaled(self, params: Params, scale: Tensor) -> Params:
        """Blocks / c, and U and V / sqrt(c): the product is scaled by c."""
        return self._structured(params).scaled(scale)[: len(params)]

    def shifted(self, params: Params, shift: Tensor) -> Params:
        """The diagonals of the blocks move, U and V stay."""
        return self._structured(params).shifted(shift)[: len(params)]

    def normalize(self, params: Params, rule: SpectralNormalization) -> Params:
        """As every state matrix; or each block and U V^T by itself."""
        if rule.granularity != 'block':
            return super().normalize(params, rule)
        rho_max = rule.rho_max
        if isinstance(rho_max, Tensor):
            rho_max = rho_max[:, None]
        blocks, *factors = params
        find = spectral_radius if rule.radius == 'exact' else gelfand_bound
        detach = rule.detach_scale
        scale = radius_scale(find(blocks), rho_max, detach=detach)
        blocks = blocks / scale[..., None, None]
        if factors:
            # U V^T has the nonzero eigenvalues of V^T U
            radius = find(factors[1].mT @ factors[0])[:, None]
            scale = radius_scale(radius, rho_max, detach=detach)
            root = scale.sqrt()[..., None]
            factors = [factor / root for factor in factors]
        return (blocks, *factors)

    def clamp(self, params: Params, rule: EigenvalueClamping) -> Params:
        """Move all eigenvalues of a matrix until the largest obeys."""
        abscissa = spectral_abscissa(self.dense_of(params))
        return self.shifted(params, abscissa_shift(abscissa, -rule.floor))


class _Known(NamedTuple):
    """A decomposition and what was decomposed."""

    dense: Tensor  # (groups, d_state, d_state), float64
    basis: Eigenbasis


class _Obeying(NamedTuple):
    """A projection and what was projected."""

    params: Params
    rules: tuple[Constraint, ...]
    dtype: torch.dtype
    result: Params

    def is_of(
        self,
        params: Params,
        rules: tuple[Constraint, ...],
        dtype: torch.dtype,
    ) -> bool:
        """Whether it answers the question for these."""
        same = zip(self.params, params, strict=True)
        return (
            self.dtype == dtype
            and all(a is b for a, b in zip(self.rules, rules, strict=False))
            and len(self.rules) == len(rules)
            and all(torch.equal(a, b) for a, b in same)
        )


@torch.no_grad()
def decompose_together(matrices: Iterable[nn.Module]) -> None:
    """Diagonalize the full matrices among these in one batched call.

    Each remembers its part until its parameters change. On the CPU in
    float64: the matrices are small, and a GPU would wait for the host.

    Args:
        matrices (Iterable[nn.Module]): Others than full ones are left alone.
    """
    full = [m for m in matrices if isinstance(m, FullStateMatrix)]
    for d_state in {m.d_state for m in full}:
        _decompose([m for m in full if m.d_state == d_state])


def _decompose(matrices: Sequence[FullStateMatrix]) -> None:
    dense = [m._wide(m.effective()) for m in matrices]
    together = torch.cat(dense)
    known = [m._known for m in matrices]
    if all(known) and torch.equal(
        torch.cat([k.dense for k in known if k]), together
    ):
        return
    basis = decompose(together)
    parts = zip(
        *(x.split([len(d) for d in dense]) for x in basis), strict=True
    )
    for matrix, own, part in zip(matrices, dense, parts, strict=True):
        matrix._known = _Known(own, Eigenbasis(*part))


@functools.cache
def _say_exponential(found: str) -> None:
    print_log(
        f'{found}: that layer runs with the matrix exponential, which is '
        'exact and hundreds of times slower. EigenvalueClampingHook keeps '
        "the condition number; on_defective='raise' stops instead",
        level=logging.WARNING,
    )


def _check_divides(name: str, size: int, of: str, total: int) -> None:
    if size < 1 or total % size:
        raise ValueError(
            f'{name} must be a divisor of {of} = {total}, got {size!r}'
        )
