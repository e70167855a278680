"""Diagonal state matrices: one eigenvalue per channel and state."""

import math

import torch
from torch import Tensor, nn

from mmstabvim.layers.state_matrix.base import (
    Params,
    ScanMatrices,
    StateMatrix,
)
from mmstabvim.layers.state_matrix.constraints import (
    EigenvalueClamping,
    SpectralNormalization,
)
from mmstabvim.stability.clamping import clamp_real_part, straight_through
from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.normalization import log_radius_scale


class DiagonalStateMatrix(StateMatrix):
    """A state matrix whose parameters are its eigenvalues."""

    def scan_matrices(self, B: Tensor, C: Tensor) -> ScanMatrices:
        """B and C as they are; A in the precision of the state."""
        B, C = (m.unflatten(-1, (1, -1)) for m in (B, C))
        return ScanMatrices(self.eigenvalues(), B, C)

    def clamp(self, params: Params, rule: EigenvalueClamping) -> Params:
        """Clamp each eigenvalue; its gradient passes as if unclamped."""
        clamped = self._clamp(params, rule)
        return tuple(
            straight_through(old, new)
            for old, new in zip(params, clamped, strict=True)
        )

    def _clamp(self, params: Params, rule: EigenvalueClamping) -> Params:
        raise NotImplementedError


class NegExpStateMatrix(DiagonalStateMatrix):
    """Real negative diagonal ``A = -exp(A_log)``, as in Mamba and Vim.

    Initialized to S4D-Real: ``A[d, n] = -(n + 1)``. Always stable: every
    eigenvalue is negative.

    Args:
        d_inner (int): Channels.
        d_state (int): State size N.

    Source: arXiv:2206.11893, Sec. 4 (S4D-Real).
    """

    can_be_unstable = False

    def __init__(self, d_inner: int, d_state: int) -> None:
        super().__init__(d_inner, d_state)
        modes = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(modes.log().repeat(d_inner, 1))

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
    """

    def __init__(self, d_inner: int, d_state: int) -> None:
        super().__init__(d_inner, d_state)
        modes = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A = nn.Parameter(-modes.repeat(d_inner, 1))

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

    Initialized to S4D-Lin: ``-1/2 + i pi n``. B_t and C_t are complex, so
    their projections are twice as wide, and the output is ``2 Re(sum C h)``.

    Args:
        d_inner (int): Channels.
        d_state (int): Stored eigenvalues, each for two real states.
        real_part (str): ``'neg_exp'``: the real part is ``-exp(log_re)``;
            ``'free'``: the parameter ``re`` itself, of any sign. Defaults to
            ``'neg_exp'``.

    Source: arXiv:2206.11893, Eq. 9 (S4D-Lin).
    """

    multiplicity, numbers = 2, 2

    def __init__(
        self, d_inner: int, d_state: int, real_part: str = 'neg_exp'
    ) -> None:
        super().__init__(d_inner, d_state)
        check_choice('real_part', real_part, ('neg_exp', 'free'))
        self.can_be_unstable = real_part == 'free'
        half = torch.full((d_inner, d_state), 0.5)
        if self.can_be_unstable:
            self.re = nn.Parameter(-half)
        else:
            self.log_re = nn.Parameter(half.log())
        modes = torch.arange(d_state, dtype=torch.float32)
        self.im = nn.Parameter(math.pi * modes.repeat(d_inner, 1))

    def eigenvalues_of(self, params: Params) -> Tensor:
        """Of (log_re or re, im): complex, (d_inner, d_state)."""
        re, im = params
        return torch.complex(re if self.can_be_unstable else -re.exp(), im)

    def scan_matrices(self, B: Tensor, C: Tensor) -> ScanMatrices:
        """B and C from interleaved real and imaginary parts."""
        B, C = (_as_complex(m)[:, :, None] for m in (B, C))
        return ScanMatrices(self.eigenvalues(), B, C)

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


def _as_complex(x: Tensor) -> Tensor:
    """(..., 2 n) interleaved pairs as complex (..., n)."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous())


def _lower_log(x: Tensor, rule: SpectralNormalization) -> Tensor:
    """Subtract what the largest of a row, or of all, has above the bound."""
    largest, rho_max = x.amax(-1), rule.rho_max
    if rule.granularity == 'layer':
        largest = largest.amax().expand_as(largest)
        if isinstance(rho_max, Tensor):
            rho_max = rho_max.amax()
    excess = log_radius_scale(largest, rho_max)
    return (x - excess[:, None]).to(x.dtype)


def _clamp_log(x: Tensor, rule: EigenvalueClamping) -> Tensor:
    low = math.log(rule.floor) if rule.floor > 0 else -math.inf
    high = math.inf if rule.lambda_max is None else math.log(rule.lambda_max)
    return x.clamp(low, high)


def _add_in_log_space(x: Tensor, shift: Tensor) -> Tensor:
    """``log(exp(x) + shift)``, the same bits where the shift is 0."""
    safe = torch.where(shift > 0, shift, torch.ones_like(shift))
    return torch.where(shift > 0, torch.logaddexp(x, safe.log()), x)
