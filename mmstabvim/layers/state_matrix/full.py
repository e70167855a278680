"""Full state matrices: block-diagonal plus low rank."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mmstabvim.layers.state_matrix.base import (
    Params,
    ScanMatrices,
    StateMatrix,
    autocast_off,
)
from mmstabvim.layers.state_matrix.constraints import (
    Constraint,
    EigenvalueClamping,
    SpectralNormalization,
)
from mmstabvim.layers.state_matrix.initialization import (
    check_init,
    full_start,
)
from mmstabvim.stability.clamping import (
    clamp_matrix,
    clamp_real_part,
    fit_block_low_rank,
)
from mmstabvim.stability.eigenbasis import Eigenbasis, decompose
from mmstabvim.stability.known_eigenbasis import known_eig
from mmstabvim.stability.normalization import radius_scale
from mmstabvim.stability.perturbation import Perturbation
from mmstabvim.stability.spectral import (
    gelfand_bound,
    spectral_abscissa,
    spectral_radius,
)

SLACK = 1e-6
"""By how much a real part may exceed its bound, relative to the matrix."""


class FullStateMatrix(StateMatrix):
    """Matrices ``blkdiag(A_1, ..., A_K) + U V^T``, shared by channel groups.

    The step size multiplies the whole matrix, so all ``exp(delta A)`` share
    one eigenbasis, in which the scan is diagonal: B and C change basis, and
    nothing of A is dropped. Where that basis is ill-conditioned, a nearby
    matrix is diagonalized instead; failing that the scan runs with the
    matrix exponential.

    Initialized to ``-diag(1, ..., N)`` with ``U = 0`` and a small random V;
    other initializations are blocks too, HiPPO-LegS and PTD in a rotated
    basis with ``-p p^T`` in the low-rank term. The scan runs HiPPO-LegS
    perturbed, as any matrix without a usable eigenbasis.

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
        kappa_max (float): Condition number of the eigenbasis above which it
            is not used. Defaults to 1e3.
        init (str): ``'s4d_real'``, ``'s4d_lin'``, ``'s4d_inv'``,
            ``'s4d_legs'``, ``'hippo'`` or ``'ptd'``. Defaults to
            ``'s4d_real'``.
        ptd (Perturbation, optional): How ``'ptd'`` perturbs the blocks; in
            configs its fields are options such as ``ptd_norm=0.4``. Defaults
            to None, for its defaults.

    Raises:
        ValueError: If a size does not divide or is out of range, or the
            structure cannot hold the initialization.

    Source: arXiv:2111.00396 for diagonal plus low rank; arXiv:2310.01698 for
    the perturbation.
    """

    granularities = ('channel', 'layer', 'block')

    residual: Tensor | None = None
    """Of the last fit of clamped matrices to the structure, relative."""

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
    ) -> None:
        super().__init__(d_inner, d_state)
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
        self.kappa_max = kappa_max
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

    # ------------------------------------------- what the forward pass uses

    def acts_on_eigenvalues(self, rule: Constraint) -> bool:
        """Clamping in the eigenbasis needs no parameters to match."""
        return rule in self._clamping_rules()

    def _clamping_rules(self) -> list[EigenvalueClamping]:
        """What is applied to the eigenvalues in the forward pass."""
        return [
            rule
            for rule in self.reparametrizations
            if isinstance(rule, EigenvalueClamping)
            and rule.method in (None, 'eig')
        ]

    def eigenvalues(self) -> Tensor:
        """Eigenvalues in use, (groups, d_state), complex, 1/step."""
        return self._clamped(super().eigenvalues())

    def dense(self) -> Tensor:
        """Matrices in use, (groups, d_state, d_state), 1/step."""
        dense = super().dense()
        for rule in self._clamping_rules():
            dense = clamp_matrix(
                dense,
                rule.floor,
                rule.lambda_max,
                'eig',
                ste=rule.grad == 'ste',
            )
        return dense

    def condition(self) -> Tensor:
        """Largest condition number of the eigenbases in use, a scalar."""
        dense = super().dense()
        return self._lookup(dense).condition.amax().to(dense.device)

    def _clamped(self, values: Tensor) -> Tensor:
        """Eigenvalues after clamping in the eigenbasis, if that is asked."""
        for rule in self._clamping_rules():
            values = clamp_real_part(
                values, rule.floor, rule.lambda_max, ste=rule.grad == 'ste'
            )
        return values

    def scan_matrices(self, B: Tensor, C: Tensor) -> ScanMatrices | None:
        """All N modes of the real matrix, so half of C: the scan doubles."""
        with autocast_off(self):
            dense = super().dense()
            basis = self._eigenbasis(dense)
            if basis is None:
                return None
            values, vectors = basis
            narrow = dense.dtype.to_complex()
            inverse = torch.linalg.inv(vectors).to(dense.device, narrow)
            vectors = vectors.to(dense.device, narrow)
            values = self._clamped(values.to(dense.device, narrow))
            channels = self.d_inner // self.groups
            return ScanMatrices(
                values.repeat_interleave(channels, 0),
                torch.einsum('blm,gnm->blgn', B.to(narrow), inverse),
                torch.einsum('blm,gmn->blgn', C.to(narrow), vectors / 2),
            )

    def _eigenbasis(self, dense: Tensor) -> tuple[Tensor, Tensor] | None:
        """Eigenvalues and eigenvectors, None if they cannot be used.

        Decomposed once for each value of the parameters: the decomposition
        itself is looked up, the gradient flows through it anew.
        """
        known = self._lookup(dense)
        if not known.ok.all():
            return None
        return known_eig(
            dense.double().cpu(), known.eigenvalues, known.vectors
        )

    def _lookup(self, dense: Tensor) -> Eigenbasis:
        known = self._known
        if known is None or not torch.equal(known.dense, dense):
            decompose_together([self])
            known = cast(_Known, self._known)
        return known.basis

    # ----------------------------------------------------- parametrization

    def dense_of(self, params: Params) -> Tensor:
        """Matrices (groups, d_state, d_state), 1/step."""
        blocks = params[0]
        eye = torch.eye(
            blocks.shape[1], dtype=blocks.dtype, device=blocks.device
        )
        # (groups, K, b, 1, b) times (K, 1, K, 1)
        dense = blocks[:, :, :, None] * eye[:, None, :, None]
        dense = dense.flatten(3, 4).flatten(1, 2)
        if self.rank:
            dense = dense + params[1] @ params[2].mT
        return dense

    def eigenvalues_of(self, params: Params) -> Tensor:
        """Complex, (groups, d_state), float64 inside."""
        dense = self.dense_of(params)
        wide = dense.double().cpu()
        values = torch.linalg.eigvals(wide)
        if torch.is_grad_enabled() and wide.requires_grad:
            # eigenvalues that coincide have no gradient of their own
            values = decompose(wide, kappa_max=1e12).eigenvalues
        return values.to(dense.device, dense.dtype.to_complex())

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
        blocks, *factors = params
        root = scale.sqrt()[:, None, None]
        blocks = blocks / scale[:, None, None, None]
        return (blocks, *(factor / root for factor in factors))

    def shifted(self, params: Params, shift: Tensor) -> Params:
        """The diagonals of the blocks move, U and V stay."""
        blocks, *factors = params
        eye = torch.eye(
            self.block_size, dtype=blocks.dtype, device=blocks.device
        )
        return (blocks - shift[:, None, None, None] * eye, *factors)

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
        """By ``rule.method``, ``'shift'`` unless it names another."""
        if rule.method in ('eig', 'schur') or rule.lambda_max is not None:
            params = self._fit(params, rule)
        return self._shift(params, rule)

    def _shift(self, params: Params, rule: EigenvalueClamping) -> Params:
        """Move all eigenvalues of a matrix until the largest obeys."""
        dense = self.dense_of(params)
        excess = spectral_abscissa(dense) + rule.floor
        within = excess <= _tolerance(dense, rule)
        return self.shifted(
            params, torch.where(within, torch.zeros_like(excess), excess)
        )

    @torch.no_grad()
    def _fit(self, params: Params, rule: EigenvalueClamping) -> Params:
        """Blocks and low rank nearest to the clamped violating matrices."""
        dense = self.dense_of(params)
        method = 'eig' if rule.method == 'eig' else 'schur'
        target = clamp_matrix(dense, rule.floor, rule.lambda_max, method)
        wrong = (target != dense).flatten(1).any(1)
        if not wrong.any():
            return params
        start = (self.U[wrong], self.V[wrong]) if self.rank else None
        *fitted, self.residual = fit_block_low_rank(
            target[wrong], self.block_size, self.rank, start=start
        )
        new = tuple(x.clone() for x in params)
        for old, value in zip(new, fitted, strict=False):
            old[wrong] = value.to(old.dtype)
        return new


def _tolerance(dense: Tensor, rule: EigenvalueClamping) -> Tensor:
    """Excess of a real part that rounding explains, (groups,)."""
    norm = torch.linalg.matrix_norm(dense.detach())
    return SLACK * norm.clamp(min=rule.floor)


class _Known(NamedTuple):
    """A decomposition and what was decomposed."""

    dense: Tensor  # (groups, d_state, d_state)
    basis: Eigenbasis


@torch.no_grad()
def decompose_together(matrices: Iterable[nn.Module]) -> None:
    """Diagonalize the full matrices among these in one batched call.

    Each remembers its part until its parameters change. On the CPU in
    float64: the matrices are small, and a GPU would wait for the host.

    Args:
        matrices (Iterable[nn.Module]): Others than full ones are left alone.
    """
    full = [m for m in matrices if isinstance(m, FullStateMatrix)]
    sizes = {(m.d_state, m.kappa_max) for m in full}
    for d_state, kappa_max in sizes:
        alike = [
            m for m in full if (m.d_state, m.kappa_max) == (d_state, kappa_max)
        ]
        _decompose(alike, kappa_max)


def _decompose(matrices: Sequence[FullStateMatrix], kappa_max: float) -> None:
    dense = [StateMatrix.dense(m) for m in matrices]
    together = torch.cat(dense)
    known = [m._known for m in matrices]
    if all(known) and torch.equal(
        torch.cat([k.dense for k in known if k]), together
    ):
        return
    basis = decompose(together.double().cpu(), kappa_max, together.dtype)
    parts = zip(
        *(x.split([len(d) for d in dense]) for x in basis), strict=True
    )
    for matrix, own, part in zip(matrices, dense, parts, strict=True):
        matrix._known = _Known(own, Eigenbasis(*part))


def _check_divides(name: str, size: int, of: str, total: int) -> None:
    if size < 1 or total % size:
        raise ValueError(
            f'{name} must be a divisor of {of} = {total}, got {size!r}'
        )
