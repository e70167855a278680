"""Diagonal state matrices: one eigenvalue per channel and state."""

import math
from collections.abc import Sequence

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
    check_together,
)
from mmstabvim.layers.state_matrix.fixed_basis import (
    FixedBasis,
    InputBias,
    as_complex,
)
from mmstabvim.layers.state_matrix.initialization import (
    check_init,
    diagonal_start,
)
from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.state.clamping import (
    clamp_real_part,
    straight_through,
)
from mmstabvim.stability.state.eigenbasis import condition_number
from mmstabvim.stability.state.hippo import s4d_real
from mmstabvim.stability.state.normalization import log_radius_scale
from mmstabvim.stability.state.perturbation import Perturbation


class DiagonalStateMatrix(StateMatrix):
    """A state matrix whose parameters are its eigenvalues."""

    def scan_matrices(self, B: Tensor, C: Tensor) -> ScanMatrices:
        """B and C as they are; A in the precision of the state."""
        B, C = (m.unflatten(-1, (1, -1)) for m in (B, C))
        return ScanMatrices(self.eigenvalues(), B, C)

    def clamp(self, params: Params, rule: EigenvalueClamping) -> Params:
        """Clamp each eigenvalue; its gradient is as ``rule.grad`` says."""
        clamped = self._clamp(params, rule)
        if rule.grad == 'clamp':
            return clamped
        return tuple(
            straight_through(old, new)
            for old, new in zip(params, clamped, strict=True)
        )

    def _clamp(self, params: Params, rule: EigenvalueClamping) -> Params:
        raise NotImplementedError

    def obeying(
        self,
        params: Params,
        rules: Sequence[Constraint],
        dtype: torch.dtype | None = None,
        name: str = '',
    ) -> Params:
        """Parameters that obey rules together; rows that do stay as they are.

        In a narrower dtype the result is rounded towards what the rules ask.
        """
        if not rules:
            return params
        check_together(rules)
        dtype = params[0].dtype if dtype is None else dtype
        new = params
        for rule in rules:
            new = self._rounded(rule(self, new), rule, dtype)
        if len(rules) < 2:
            return new
        obeys = self._obeys(params, rules, torch.finfo(dtype).eps)[:, None]
        pairs = zip(params, new, strict=True)
        return tuple(torch.where(obeys, old, x) for old, x in pairs)

    def _rounded(
        self, params: Params, rule: Constraint, dtype: torch.dtype
    ) -> Params:
        """Numbers of a narrower dtype that obey, in their own dtype."""
        wide = params[0].dtype
        if dtype.itemsize >= wide.itemsize:
            return params
        stored = tuple(x.to(dtype) for x in params)
        for _ in range(_ROUNDINGS):
            given = tuple(x.to(wide) for x in stored)
            wanted = rule(self, given)
            moved = [w != x for w, x in zip(wanted, given, strict=True)]
            if not torch.stack([m.any() for m in moved]).any():
                break
            stored = tuple(
                torch.where(m, _next(x, w), x)
                for m, x, w in zip(moved, stored, wanted, strict=True)
            )
        return tuple(x.to(wide) for x in stored)

    @torch.no_grad()
    def _obeys(
        self, params: Params, rules: Sequence[Constraint], rounding: float
    ) -> Tensor:
        """Which rows obey all rules, (rows,), bool.

        Clamping the real part of a complex eigenvalue takes its modulus up
        to ``hypot(rho_max, eps)``.
        """
        values = self.eigenvalues_of(params)
        low, high = values.real.amin(-1), values.real.amax(-1)
        modulus = values.abs().amax(-1)
        limits = [r.abscissa_limit for r in rules]
        ceiling = min(
            (limit for limit in limits if limit is not None),
            default=math.inf,
        )
        obeys = high <= ceiling
        for rule in rules:
            if isinstance(rule, EigenvalueClamping):
                if rule.lambda_max is not None:
                    obeys = obeys & (low >= -rule.lambda_max)
            elif rule.domain == 'continuous':
                rho_max = torch.as_tensor(rule.rho_max).to(modulus)
                if rule.granularity == 'layer':
                    rho_max = rho_max.amax()
                if values.is_complex() and ceiling < 0:
                    eps = rho_max.new_tensor(-ceiling * (1 + rounding))
                    rho_max = rho_max.hypot(eps)
                within = modulus <= rho_max * (1 + 1e-6)
                layer = rule.granularity == 'layer'
                obeys = obeys & (within.all() if layer else within)
        return obeys


_ROUNDINGS = 8
"""Units in the last place that a rounded parameter may have to be moved."""


def _next(x: Tensor, towards: Tensor) -> Tensor:
    """The neighbour of each number in its dtype, on the side of another."""
    infinite = torch.where(
        towards > x.to(towards.dtype), torch.inf, -torch.inf
    )
    # halves have no nextafter on a GPU
    return torch.nextafter(x.cpu(), infinite.to(x.dtype).cpu()).to(x.device)


def _log_distance(log_rate: Tensor, real: float) -> float:
    """How far the smallest of these is from ``log(-real)``."""
    if real >= 0:
        return math.inf
    return max(float(log_rate.detach().amin()) - math.log(-real), 0.0)


class NegExpStateMatrix(DiagonalStateMatrix):
    """Real negative diagonal ``A = -exp(A_log)``, as in Mamba and Vim.

    Initialized to S4D-Real: ``A[d, n] = -(n + 1)``. Always stable: every
    eigenvalue is negative.

    Args:
        d_inner (int): Channels.
        d_state (int): State size N.
        init (str): ``'s4d_real'``, as the eigenvalues are real. Defaults to
            it.

    Source: arXiv:2206.11893, Sec. 4 (S4D-Real).
    """

    can_be_unstable = False

    def __init__(
        self, d_inner: int, d_state: int, init: str = 's4d_real'
    ) -> None:
        super().__init__(d_inner, d_state)
        check_init(init, 'neg_exp')
        rates = -s4d_real(d_state, torch.float32)
        self.A_log = nn.Parameter(rates.log().repeat(d_inner, 1))

    def distance_to(self, real: float) -> float:
        """In units of A_log; infinite for ``real >= 0``."""
        return _log_distance(self.A_log, real)

    def eigenvalues_of(self, params: Params) -> Tensor:
        """Of (A_log,): real, (d_inner, d_state)."""
        return -torch.exp(params[0])

    def normalize(self, params: Params, rule: SpectralNormalization) -> Params:
        """By a subtraction in log space, where nothing overflows."""
        if rule.domain == 'discrete':
            return super().normalize(params, rule)
        return (_lower_log(params[0], rule),)

    def scaled(self, params: Params, scale: Tensor) -> Params:
        """Parameters of ``A / scale``."""
        return (params[0] - scale.log()[:, None],)

    def shifted(self, params: Params, shift: Tensor) -> Params:
        """Parameters of ``A - shift I``; log(0) adds nothing."""
        return (_add_in_log_space(params[0], shift[:, None]),)

    def _clamp(self, params: Params, rule: EigenvalueClamping) -> Params:
        return (_clamp_log(params[0], rule),)


class SignedStateMatrix(DiagonalStateMatrix):
    """Real diagonal of any sign, the parameters themselves.

    Initialized to S4D-Real. The cheapest parametrization in which training
    can leave the stable half plane, and stabilizers can act.

    Args:
        d_inner (int): Channels.
        d_state (int): State size N.
        init (str): ``'s4d_real'``, as the eigenvalues are real. Defaults to
            it.
    """

    def __init__(
        self, d_inner: int, d_state: int, init: str = 's4d_real'
    ) -> None:
        super().__init__(d_inner, d_state)
        check_init(init, 'signed')
        values = s4d_real(d_state, torch.float32)
        self.A = nn.Parameter(values.repeat(d_inner, 1))

    def eigenvalues_of(self, params: Params) -> Tensor:
        """Of (A,): A itself, (d_inner, d_state)."""
        return params[0]

    def scaled(self, params: Params, scale: Tensor) -> Params:
        """Parameters of ``A / scale``."""
        return (params[0] / scale[:, None],)

    def shifted(self, params: Params, shift: Tensor) -> Params:
        """Parameters of ``A - shift I``."""
        return (params[0] - shift[:, None],)

    def _clamp(self, params: Params, rule: EigenvalueClamping) -> Params:
        return (clamp_real_part(params[0], rule.floor, rule.lambda_max),)


class ComplexStateMatrix(DiagonalStateMatrix):
    """Complex diagonal; a stored eigenvalue stands for a conjugate pair.

    B_t and C_t are complex, so their projections are twice as wide, and the
    output is ``2 Re(sum C h)``.

    With a basis the eigenvalues are all those of a real matrix ``X
    diag(lambda) X^-1``, B_t and C_t are real and change to the eigenbasis X,
    and the output is ``Re(sum C h)``: the start is the selective SSM of that
    matrix. X stays as it is in training, and is kept in checkpoints.

    Args:
        d_inner (int): Channels.
        d_state (int): Stored eigenvalues, each for two real states; with a
            basis each for one.
        real_part (str): ``'neg_exp'``: the real part is ``-exp(log_re)``;
            ``'free'``: the parameter ``re`` itself, of any sign. Defaults to
            ``'neg_exp'``.
        init (str): ``'s4d_lin'``, ``'s4d_inv'``, ``'s4d_legs'`` or ``'ptd'``,
            which starts with the d_state eigenvalues of a perturbed
            HiPPO-LegS. Defaults to ``'s4d_lin'``.
        with_basis (bool, optional): Keep the eigenbasis of ``'ptd'``; without
            it B_t and C_t are complex and only the eigenvalues are PTD's. The
            others have none. Defaults to None, for with ``'ptd'`` only.
        hippo_bias (bool): Add to each B_t a trainable constant that starts
            at HiPPO's B over N; of ``'s4d_legs'`` and ``'ptd'``. Defaults to
            False.
        ptd (Perturbation, optional): How ``'ptd'`` perturbs; in configs its
            fields are options such as ``ptd_norm=0.4``. Defaults to None, for
            its defaults.

    Raises:
        ValueError: If a choice is unknown, or does not go with the others.

    Source: arXiv:2206.11893, Sec. 4, for S4D; arXiv:2310.01698 for PTD.
    """

    multiplicity, numbers = 2, 2

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        real_part: str = 'neg_exp',
        init: str = 's4d_lin',
        with_basis: bool | None = None,
        hippo_bias: bool = False,
        ptd: Perturbation | None = None,
    ) -> None:
        super().__init__(d_inner, d_state)
        check_choice('real_part', real_part, ('neg_exp', 'free'))
        check_init(init, 'complex')
        if with_basis and init != 'ptd':
            raise ValueError(f"with_basis needs init='ptd', got {init!r}")
        self.can_be_unstable = real_part == 'free'
        start = diagonal_start(init, d_state, with_basis is not False, ptd)
        if hippo_bias and start.input_matrix is None:
            raise ValueError(
                f"hippo_bias needs init='s4d_legs' or 'ptd', got {init!r}"
            )
        values = start.eigenvalues.to(
            torch.get_default_device(), torch.get_default_dtype().to_complex()
        )
        re = values.real.repeat(d_inner, 1)
        if self.can_be_unstable:
            self.re = nn.Parameter(re)
        else:
            self.log_re = nn.Parameter((-re).log())
        self.im = nn.Parameter(values.imag.repeat(d_inner, 1))
        self.basis = self.input_bias = None
        if start.vectors is not None:
            self.basis = FixedBasis(start.vectors)
            self.multiplicity = self.numbers = 1
        if hippo_bias and start.input_matrix is not None:
            self.input_bias = InputBias(start.input_matrix)

    def distance_to(self, real: float) -> float:
        """In units of log_re, or of re if that is the parameter."""
        if self.can_be_unstable:
            return super().distance_to(real)
        return _log_distance(self.log_re, real)

    def eigenvalues_of(self, params: Params) -> Tensor:
        """Of (log_re or re, im): complex, (d_inner, d_state)."""
        re, im = params
        return torch.complex(re if self.can_be_unstable else -re.exp(), im)

    def scan_matrices(self, B: Tensor, C: Tensor) -> ScanMatrices:
        """B and C as complex numbers, in the eigenbasis if there is one."""
        if self.input_bias is not None:
            B = self.input_bias(B)
        if self.basis is not None:
            with autocast_off(self):
                B, C = self.basis(B, C)
        B, C = (as_complex(m)[:, :, None] for m in (B, C))
        return ScanMatrices(self.eigenvalues(), B, C)

    def dense_of(self, params: Params) -> Tensor:
        """Complex matrices (d_inner, d_state, d_state), 1/step."""
        values = self.eigenvalues_of(params)
        if self.basis is None:
            return torch.diag_embed(values)
        return self.basis.dense(values)

    def condition(self) -> Tensor:
        """Condition number of the eigenbasis, a scalar, 1 without one."""
        if self.basis is None:
            return super().condition()
        return condition_number(self.basis.vectors)

    def normalize(self, params: Params, rule: SpectralNormalization) -> Params:
        """In log space where the real part is a logarithm."""
        if self.can_be_unstable or rule.domain == 'discrete':
            return super().normalize(params, rule)
        log_re, im = params
        # ln |lambda|, without exp(log_re)
        tiny = torch.finfo(im.dtype).tiny
        log_im = im.abs().clamp(min=tiny).log()
        excess = _log_excess(torch.logaddexp(2 * log_re, 2 * log_im) / 2, rule)
        scale = (-excess).exp()[:, None]
        moved = (log_re - excess[:, None]).to(log_re.dtype)
        return moved, torch.where(scale == 1, im, im * scale).to(im.dtype)

    def scaled(self, params: Params, scale: Tensor) -> Params:
        """Parameters of ``A / scale``."""
        re, im = params
        scale = scale[:, None]
        if not self.can_be_unstable:
            return re - scale.log(), im / scale
        return re / scale, im / scale

    def shifted(self, params: Params, shift: Tensor) -> Params:
        """Parameters of ``A - shift I``."""
        re, im = params
        if self.can_be_unstable:
            return re - shift[:, None], im
        return _add_in_log_space(re, shift[:, None]), im

    def _clamp(self, params: Params, rule: EigenvalueClamping) -> Params:
        re, im = params
        if self.can_be_unstable:
            return clamp_real_part(re, rule.floor, rule.lambda_max), im
        return _clamp_log(re, rule), im


def _lower_log(x: Tensor, rule: SpectralNormalization) -> Tensor:
    """Subtract what the largest of a row, or of all, has above the bound."""
    return (x - _log_excess(x, rule)[:, None]).to(x.dtype)


def _log_excess(log_modulus: Tensor, rule: SpectralNormalization) -> Tensor:
    """What ``ln |lambda|`` (rows, d_state) has above the bound, (rows,)."""
    largest, rho_max = log_modulus.amax(-1), rule.rho_max
    if rule.granularity == 'layer':
        largest = largest.amax().expand_as(largest)
        if isinstance(rho_max, Tensor):
            rho_max = rho_max.amax()
    return log_radius_scale(largest, rho_max, detach=rule.detach_scale)


def _clamp_log(x: Tensor, rule: EigenvalueClamping) -> Tensor:
    # exp and log round: what is stored obeys in exact arithmetic
    rounding = 4 * torch.finfo(x.dtype).eps
    low, high = -math.inf, math.inf
    if rule.floor > 0:
        low = math.log(rule.floor)
        low += rounding * max(1.0, abs(low))
    if rule.lambda_max is not None:
        high = math.log(rule.lambda_max)
        high = max(high - rounding * max(1.0, abs(high)), low)
    return x.clamp(low, high)


def _add_in_log_space(x: Tensor, shift: Tensor) -> Tensor:
    """``log(exp(x) + shift)``, the same bits where the shift is 0."""
    safe = torch.where(shift > 0, shift, torch.ones_like(shift))
    return torch.where(shift > 0, torch.logaddexp(x, safe.log()), x)
