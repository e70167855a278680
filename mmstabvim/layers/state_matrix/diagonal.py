"""Diagonal state matrices: one eigenvalue per channel and state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmstabvim.layers.state_matrix.fixed_basis import as_complex
from mmstabvim.layers.state_matrix.parametrization import (
    Obeying,
    P,
    Parametrization,
    ScanMatrices,
)
from mmstabvim.layers.state_matrix.rules import (
    EigenvalueClamping,
    Rule,
    SpectralNormalization,
    check_compatible,
    largest_in_direction,
)
from mmstabvim.stability.state.clamping import (
    clamp_real_part,
    straight_through,
)
from mmstabvim.stability.state.normalization import log_radius_scale


class Diagonal(Parametrization[P]):
    """A parametrization by the eigenvalues themselves.

    There is a matrix for each channel: ``rows = directions * d_inner``.
    """

    def scan_matrices(self, params: P, B: Tensor, C: Tensor) -> ScanMatrices:
        """Return B and C as they are, and A in the state's precision."""
        return ScanMatrices(
            self.split(self.eigenvalues(params)),
            B.unsqueeze(-2),
            C.unsqueeze(-2),
        )

    def clamp(self, params: P, rule: EigenvalueClamping) -> P:
        """Clamp each eigenvalue, with the gradient that the rule asks for."""
        clamped = self.clamp_each(params, rule)
        if rule.grad == 'clamp':
            return clamped
        pairs = zip(params, clamped, strict=True)
        return self.pack([straight_through(old, new) for old, new in pairs])

    def clamp_each(self, params: P, rule: EigenvalueClamping) -> P:
        """Clamp each eigenvalue, with the gradient of a clamp."""
        raise NotImplementedError

    def project(
        self,
        params: P,
        rules: Sequence[Rule],
        dtype: torch.dtype | None = None,
        name: str = '',
    ) -> Obeying[P]:
        """Return parameters that obey rules together.

        Rows that obey stay as they are. In a narrower dtype the result is
        rounded towards what the rules ask.
        """
        check_compatible(rules)
        dtype = params[0].dtype if dtype is None else dtype
        new = params
        for rule in rules:
            new = self._rounded(self.obey(new, rule), rule, dtype)
        if len(rules) > 1:
            obeys = self._obeys(params, rules, torch.finfo(dtype).eps)[:, None]
            pairs = zip(params, new, strict=True)
            new = self.pack([torch.where(obeys, old, x) for old, x in pairs])
        return Obeying(new, {})

    def _rounded(self, params: P, rule: Rule, dtype: torch.dtype) -> P:
        """Round to numbers of a narrower dtype that obey."""
        wide = params[0].dtype
        if dtype.itemsize >= wide.itemsize:
            return params
        stored = [x.to(dtype) for x in params]
        for _ in range(_ROUNDINGS):
            given = self.pack([x.to(wide) for x in stored])
            wanted = self.obey(given, rule)
            moved = [w != x for w, x in zip(wanted, given, strict=True)]
            if not torch.stack([m.any() for m in moved]).any():
                break
            stored = [
                torch.where(m, _next(x, w), x)
                for m, x, w in zip(moved, stored, wanted, strict=True)
            ]
        return self.pack([x.to(wide) for x in stored])

    @torch.no_grad()
    def _obeys(
        self, params: P, rules: Sequence[Rule], rounding: float
    ) -> Tensor:
        """Tell which rows obey all rules, (rows,), bool.

        Clamping the real part of a complex eigenvalue takes its modulus up
        to ``hypot(rho_max, eps)``.
        """
        values = self.eigenvalues(params)
        low, high = values.real.amin(-1), values.real.amax(-1)
        limits = [r.abscissa_limit for r in rules]
        ceiling = min((x for x in limits if x is not None), default=math.inf)
        obeys = high <= ceiling
        for rule in rules:
            if isinstance(rule, EigenvalueClamping):
                if rule.lambda_max is not None:
                    obeys = obeys & (low >= -rule.lambda_max)
            elif rule.domain == 'continuous':
                obeys = obeys & self._within(values, rule, ceiling, rounding)
        return obeys

    def _within(
        self,
        values: Tensor,
        rule: SpectralNormalization,
        ceiling: float,
        rounding: float,
    ) -> Tensor:
        """Tell which rows are within a spectral radius, (rows,), bool."""
        modulus = values.abs().amax(-1)
        layer = rule.granularity == 'layer'
        rho_max = torch.as_tensor(rule.rho_max).to(modulus)
        rho_max = rho_max.expand_as(modulus)
        if layer:
            rho_max = largest_in_direction(rho_max, self.directions)
        if values.is_complex() and ceiling < 0:
            eps = rho_max.new_tensor(-ceiling * (1 + rounding))
            rho_max = rho_max.hypot(eps)
        above = modulus > rho_max * (1 + 1e-6)
        if layer:
            above = largest_in_direction(above, self.directions)
        return ~above


_ROUNDINGS = 8
"""Units in the last place that a rounded parameter may have to be moved."""


class NegExpParams(NamedTuple):
    """Parameters of :class:`NegExp`."""

    A_log: Tensor  # (rows, d_state)


class NegExp(Diagonal[NegExpParams]):
    """Real negative diagonal ``A = -exp(A_log)``, as in Mamba and Vim.

    Always stable: every eigenvalue is negative.

    Source: arXiv:2312.00752, Sec. 3.6.
    """

    names = ('A_log',)
    can_be_unstable = False

    def pack(self, tensors: Sequence[Tensor]) -> NegExpParams:
        """Name the parameter."""
        return NegExpParams(*tensors)

    def distance(self, params: NegExpParams, real: float) -> float:
        """Measure in units of A_log; infinite for ``real >= 0``."""
        return _log_distance(params.A_log, real)

    def eigenvalues(self, params: NegExpParams) -> Tensor:
        """Compute ``-exp(A_log)``, real, (rows, d_state)."""
        return -torch.exp(params.A_log)

    def normalize(
        self, params: NegExpParams, rule: SpectralNormalization
    ) -> NegExpParams:
        """Subtract in log space, where nothing overflows."""
        if rule.domain == 'discrete':
            return super().normalize(params, rule)
        self.check_granularity(rule)
        x = params.A_log
        excess = _log_excess(x, rule, self.directions)
        return NegExpParams((x - excess[:, None]).to(x.dtype))

    def scale(self, params: NegExpParams, divisor: Tensor) -> NegExpParams:
        """Return parameters of ``A / divisor``."""
        return NegExpParams(params.A_log - divisor.log()[:, None])

    def shift(self, params: NegExpParams, shift: Tensor) -> NegExpParams:
        """Return parameters of ``A - shift I``; log(0) adds nothing."""
        return NegExpParams(_add_in_log_space(params.A_log, shift[:, None]))

    def clamp_each(
        self, params: NegExpParams, rule: EigenvalueClamping
    ) -> NegExpParams:
        """Clamp the logarithms."""
        return NegExpParams(_clamp_log(params.A_log, rule))


class SignedParams(NamedTuple):
    """Parameters of :class:`Signed`."""

    A: Tensor  # (rows, d_state)


class Signed(Diagonal[SignedParams]):
    """Real diagonal of any sign, the parameters themselves.

    The cheapest parametrization in which training can leave the stable half
    plane, and stabilizers can act.
    """

    names = ('A',)

    def pack(self, tensors: Sequence[Tensor]) -> SignedParams:
        """Name the parameter."""
        return SignedParams(*tensors)

    def eigenvalues(self, params: SignedParams) -> Tensor:
        """Return A itself, (rows, d_state)."""
        return params.A

    def scale(self, params: SignedParams, divisor: Tensor) -> SignedParams:
        """Return parameters of ``A / divisor``."""
        return SignedParams(params.A / divisor[:, None])

    def shift(self, params: SignedParams, shift: Tensor) -> SignedParams:
        """Return parameters of ``A - shift I``."""
        return SignedParams(params.A - shift[:, None])

    def clamp_each(
        self, params: SignedParams, rule: EigenvalueClamping
    ) -> SignedParams:
        """Clamp the eigenvalues."""
        return SignedParams(
            clamp_real_part(params.A, rule.floor, rule.lambda_max)
        )


class ComplexParams(NamedTuple):
    """Parameters of :class:`Complex`."""

    real: Tensor  # (rows, d_state): the real part, or its logarithm
    im: Tensor  # (rows, d_state)


class Complex(Diagonal[ComplexParams]):
    """Complex diagonal; a stored eigenvalue stands for a conjugate pair.

    B_t and C_t are complex, so their projections are twice as wide, and the
    output is ``2 Re(sum C h)``.

    Args:
        real_part (str): ``'neg_exp'``: the real part is ``-exp(log_re)``;
            ``'free'``: the parameter ``re`` itself, of any sign. Defaults to
            ``'neg_exp'``.
        directions (int): Directions of the layer. Defaults to 1.
    """

    multiplicity, numbers = 2, 2

    def __init__(
        self, real_part: str = 'neg_exp', directions: int = 1
    ) -> None:
        super().__init__(directions)
        self.can_be_unstable = real_part == 'free'
        self.names = ('re' if self.can_be_unstable else 'log_re', 'im')

    def options(self) -> dict[str, Any]:
        """Options of the parametrization, to be shown."""
        part = 'free' if self.can_be_unstable else 'neg_exp'
        return dict(real_part=part, **super().options())

    def pack(self, tensors: Sequence[Tensor]) -> ComplexParams:
        """Name the parameters."""
        return ComplexParams(*tensors)

    def distance(self, params: ComplexParams, real: float) -> float:
        """Measure in units of log_re, or of re if that is the parameter."""
        if self.can_be_unstable:
            return super().distance(params, real)
        return _log_distance(params.real, real)

    def eigenvalues(self, params: ComplexParams) -> Tensor:
        """Compute the eigenvalues, complex, (rows, d_state)."""
        real, im = params
        return torch.complex(real if self.can_be_unstable else -real.exp(), im)

    def scan_matrices(
        self, params: ComplexParams, B: Tensor, C: Tensor
    ) -> ScanMatrices:
        """Return B and C as complex numbers."""
        return super().scan_matrices(params, as_complex(B), as_complex(C))

    def normalize(
        self, params: ComplexParams, rule: SpectralNormalization
    ) -> ComplexParams:
        """Subtract in log space where the real part is a logarithm."""
        if self.can_be_unstable or rule.domain == 'discrete':
            return super().normalize(params, rule)
        self.check_granularity(rule)
        log_re, im = params
        # ln |lambda|, without exp(log_re)
        tiny = torch.finfo(im.dtype).tiny
        log_im = im.abs().clamp(min=tiny).log()
        modulus = torch.logaddexp(2 * log_re, 2 * log_im) / 2
        excess = _log_excess(modulus, rule, self.directions)
        factor = (-excess).exp()[:, None]
        moved = (log_re - excess[:, None]).to(log_re.dtype)
        im = torch.where(factor == 1, im, im * factor).to(im.dtype)
        return ComplexParams(moved, im)

    def scale(self, params: ComplexParams, divisor: Tensor) -> ComplexParams:
        """Return parameters of ``A / divisor``."""
        real, im = params
        divisor = divisor[:, None]
        if self.can_be_unstable:
            return ComplexParams(real / divisor, im / divisor)
        return ComplexParams(real - divisor.log(), im / divisor)

    def shift(self, params: ComplexParams, shift: Tensor) -> ComplexParams:
        """Return parameters of ``A - shift I``."""
        real, im = params
        if self.can_be_unstable:
            return ComplexParams(real - shift[:, None], im)
        return ComplexParams(_add_in_log_space(real, shift[:, None]), im)

    def clamp_each(
        self, params: ComplexParams, rule: EigenvalueClamping
    ) -> ComplexParams:
        """Clamp the real parts."""
        real, im = params
        if self.can_be_unstable:
            real = clamp_real_part(real, rule.floor, rule.lambda_max)
        else:
            real = _clamp_log(real, rule)
        return ComplexParams(real, im)


def _next(x: Tensor, towards: Tensor) -> Tensor:
    """Return each number's neighbour in its dtype, on the side of another."""
    infinite = torch.where(
        towards > x.to(towards.dtype), torch.inf, -torch.inf
    )
    # halves have no nextafter on a GPU
    return torch.nextafter(x.cpu(), infinite.to(x.dtype).cpu()).to(x.device)


def _log_distance(log_rate: Tensor, real: float) -> float:
    """Measure how far the smallest of these is from ``log(-real)``."""
    if real >= 0:
        return math.inf
    return max(float(log_rate.detach().amin()) - math.log(-real), 0.0)


def _log_excess(
    log_modulus: Tensor, rule: SpectralNormalization, directions: int
) -> Tensor:
    """Return the excess of ``ln |lambda|`` (rows, d_state), (rows,)."""
    largest, rho_max = log_modulus.amax(-1), rule.rho_max
    if rule.granularity == 'layer':
        largest = largest_in_direction(largest, directions)
        if isinstance(rho_max, Tensor):
            rho_max = largest_in_direction(rho_max, directions)
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
    """Compute ``log(exp(x) + shift)``, the same bits where the shift is 0."""
    safe = torch.where(shift > 0, shift, torch.ones_like(shift))
    return torch.where(shift > 0, torch.logaddexp(x, safe.log()), x)
