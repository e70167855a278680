"""Certified ranges of the activations of a selective state-space layer.

A root-mean-square norm leaves tokens in an ellipsoid whatever the image is.
Every activation up to the scan's output then has a range that follows from
the weights alone, for sequences of any length. docs/ranges.md has the proofs.
"""

import math
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.weights.norms import spectral_norm

SILU_ARGMIN, SILU_MIN = -1.2784645427610738, -0.2784645427610738
ROUNDINGS = 12
"""Successive roundings between the norm and the step size."""


class Interval(NamedTuple):
    """Range of each entry."""

    low: Tensor
    high: Tensor

    @property
    def magnitude(self) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(-self.low, self.high)

    def widened(self, by: Tensor) -> 'Interval':
        """Move both ends outwards."""
        return Interval(self.low - by, self.high + by)

    def within(self, other: 'Interval') -> 'Interval':
        """Intersect two ranges of the same entries."""
        return Interval(
            torch.maximum(self.low, other.low),
            torch.minimum(self.high, other.high),
        )


def rounding_slack(unit: float, terms: int) -> float:
    """Bound the rounding error of a sum of products.

    The error is relative to the sum of the absolute values. It covers at most
    :data:`ROUNDINGS` roundings to the narrow dtype, SiLU between them, and
    three sums in float32. Underflow is not counted.

    Args:
        unit (float): Unit roundoff of the narrow dtype, half its ``eps``; 0
            for exact arithmetic.
        terms (int): Length of the longest sum.

    Returns:
        float: >= 0.
    """
    if unit == 0:
        return 0.0
    narrow = ROUNDINGS * math.log1p(unit)
    sums = 3 * terms * math.log1p(2.0**-24)
    return 1.1 * math.expm1(narrow + sums)


def silu_range(box: Interval) -> Interval:
    """Exact range of SiLU over intervals.

    SiLU decreases up to -1.2785 and increases from there.

    Args:
        box (Interval): Any shape.

    Returns:
        Interval: Same shape.
    """
    ends = F.silu(box.low), F.silu(box.high)
    inside = (box.low < SILU_ARGMIN) & (box.high > SILU_ARGMIN)
    low = torch.where(inside, SILU_MIN, torch.minimum(*ends))
    return Interval(low, torch.maximum(*ends))


def affine_range(weight: Tensor, box: Interval) -> Interval:
    """Exact range of ``weight @ x`` for x in a box.

    Args:
        weight (Tensor): (rows, dim).
        box (Interval): (dim,).

    Returns:
        Interval: (rows,).
    """
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    return Interval(
        up @ box.low + down @ box.high, up @ box.high + down @ box.low
    )


class NormedLinear:
    """Linear layer behind a root-mean-square norm, ``x = gain @ s``.

    The norm gives ``scale * s`` with ``|s| < sqrt(d_model)``, so each output
    is bounded by its row, and all together by the matrix.

    Args:
        weight (Tensor): (rows, d_model), weight of the linear layer.
        scale (Tensor): (d_model,), scale of the norm.

    Source: arXiv:1910.07467, Eq. 4.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        if weight.dim() != 2 or scale.shape != weight.shape[1:]:
            raise ValueError(
                'weight must be (rows, d_model) and scale (d_model,), got '
                f'{tuple(weight.shape)} and {tuple(scale.shape)}'
            )
        self.gain = weight.double() * scale.double()
        self.radius = math.sqrt(weight.shape[1])

    @cached_property
    def rows(self) -> Tensor:
        """Norm of each row, (rows,)."""
        norms: Tensor = torch.linalg.vector_norm(self.gain, dim=1)
        return norms

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Spectral norms of the matrix as it is and with unit rows."""
        unit = self.gain / torch.where(self.rows == 0, 1.0, self.rows)[:, None]
        return spectral_norm(self.gain), spectral_norm(unit)

    @property
    def outputs(self) -> Tensor:
        """Largest absolute value of each output, (rows,); attained."""
        return self.radius * self.rows

    def signed_sum(self, weights: Tensor) -> Tensor:
        """Largest ``|sum_d weights[..., d] x_d|``, (...); attained."""
        rows = weights @ self.gain
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
        return self.radius * norms

    def absolute_sum(self, squares: Tensor, squares_rows: Tensor) -> Tensor:
        """Bound ``sum_d c_d |x_d|`` by the Cauchy-Schwarz inequality.

        Args:
            squares (Tensor): (...), ``sum_d c_d^2``.
            squares_rows (Tensor): (...), ``sum_d (c_d rows_d)^2``.

        Returns:
            Tensor: (...).
        """
        plain, unit = self.norms
        return self.radius * torch.minimum(
            plain * squares.sqrt(), unit * squares_rows.sqrt()
        )


class ScanInput:
    """Range of a scan's input ``u = silu(bias + taps * x)``.

    Args:
        x (NormedLinear): Input of the convolution, (d_inner,) per token.
        taps (Tensor): (d_inner, width), kernel of the depthwise convolution.
        bias (Tensor): (d_inner,), its bias.
        slack (float): Relative error of rounding; see
            :func:`rounding_slack`. Defaults to 0.0, exact arithmetic.
    """

    def __init__(
        self, x: NormedLinear, taps: Tensor, bias: Tensor, slack: float = 0.0
    ) -> None:
        if taps.dim() != 2 or not len(taps) == len(bias) == len(x.rows):
            raise ValueError(
                f'taps must be ({len(x.rows)}, width) and bias '
                f'({len(x.rows)},), got {tuple(taps.shape)} and '
                f'{tuple(bias.shape)}'
            )
        self.x, self.slack = x, slack
        self.taps, self.bias = taps.double(), bias.double()
        reach = self.taps.abs().sum(1) * x.outputs
        self._size = self.bias.abs() + reach  # (d_inner,)
        self._sum = Interval(self.bias - reach, self.bias + reach)

    @property
    def before_silu(self) -> Interval:
        """Range of the convolution's output, (d_inner,)."""
        return self._sum.widened(self.slack * self._size)

    @property
    def u(self) -> Interval:
        """Range of the scan's input, (d_inner,)."""
        return silu_range(self.before_silu).widened(self.slack * self._size)

    def projected(
        self, weight: Tensor, left: Tensor | None = None
    ) -> Interval:
        """Range of ``left @ weight @ u``.

        It is the intersection of two ranges. The first takes u anywhere in
        its box. The second splits ``silu(a) = a / 2 + (a / 2) tanh(a / 2)``:
        the first part is linear in the tokens, so that signs cancel, and the
        second lies between 0 and ``|a| / 2``.

        Args:
            weight (Tensor): (inner, d_inner).
            left (Tensor, optional): (rows, inner).

        Returns:
            Interval: (rows,), or (inner,) without ``left``.
        """
        weight = weight.double()
        product, size = weight, weight.abs() @ self._size
        if left is not None:
            left = left.double()
            product, size = left @ weight, left.abs() @ size
        box = affine_range(product, silu_range(self._sum))
        found = box.within(self._split(product, weight, left))
        return found.widened(self.slack * size)

    def projected_norm(
        self, weight: Tensor, left: Tensor | None = None
    ) -> Tensor:
        """Bound the Euclidean norm of ``left @ weight @ u``, a scalar.

        The bound is that of :meth:`projected` with spectral norms in place of
        rows, and at most the norm of the entries' bounds.

        Args:
            weight (Tensor): (inner, d_inner).
            left (Tensor, optional): (rows, inner).

        Returns:
            Tensor: Scalar.
        """
        weight = weight.double()
        product, size = weight, weight.abs() @ self._size
        if left is not None:
            left = left.double()
            product, size = left @ weight, left.abs() @ size
        linear = (product @ self.bias).norm()
        for tap in self.taps.T:
            linear = linear + self.x.radius * spectral_norm(
                product * tap @ self.x.gain
            )
        even = self.bias.norm() + self._reach
        whole = (linear + spectral_norm(product) * even) / 2
        whole = whole + self.slack * size.norm()
        entries = self.projected(weight, left).magnitude
        return torch.minimum(whole, entries.norm())

    @cached_property
    def _reach(self) -> Tensor:
        """Bound the norm of the convolution without bias, a scalar."""
        reach = self.taps.new_zeros(())
        for tap in self.taps.T:
            scaled = tap[:, None] * self.x.gain
            # quicker than singular values, as good for the largest one
            peak = torch.linalg.eigvalsh(scaled.mT @ scaled)[-1]
            reach = reach + peak.clamp(min=0).sqrt()
        return self.x.radius * reach

    def _split(
        self, product: Tensor, weight: Tensor, left: Tensor | None
    ) -> Interval:
        """Range from the linear and the even part of SiLU."""
        center = product @ self.bias / 2
        swing = torch.zeros_like(center)
        for tap in self.taps.T:
            mixed = (weight * tap) @ self.x.gain
            mixed = mixed if left is None else left @ mixed
            swing += torch.linalg.vector_norm(mixed, dim=-1)
        swing *= self.x.radius / 2
        return Interval(
            center - swing - self._even(product.clamp(max=0)),
            center + swing + self._even(product.clamp(min=0)),
        )

    def _even(self, weights: Tensor) -> Tensor:
        """Bound ``sum_d |weights_d| (a_d / 2) tanh(a_d / 2)``, (rows,)."""
        half = self._size / 2
        box = weights.abs() @ (half * half.tanh())
        squares, taps = weights.square(), self.taps.square()
        spread = self.x.absolute_sum(
            squares @ taps, squares @ (taps * self.x.rows[:, None].square())
        ).sum(-1)
        return torch.minimum(
            box, (weights.abs() @ self.bias.abs() + spread) / 2
        )


def mode_gain(
    real_part: Tensor, delta_max: Tensor, b_disc: str = 'euler'
) -> Tensor:
    """Largest state under a drive ``|B_t u_t| <= 1``.

    For ``h[t] = exp(delta[t] lambda) h[t-1] + B_bar[t] u[t]`` with any step
    sizes up to ``delta_max`` and any number of tokens: ``delta_max / (1 -
    exp(delta_max Re lambda))`` for Euler, at most ``1 / |Re lambda| +
    delta_max``, and ``1 / |Re lambda|`` for zero-order hold. A real lambda
    attains it as the sequence grows.

    Args:
        real_part (Tensor): Real part of lambda, 1/step.
        delta_max (Tensor): Largest step size, >= 0, steps; broadcast.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.

    Returns:
        Tensor: In steps; infinite where the real part is not negative.

    Example:
        >>> mode_gain(torch.tensor([-2.0, 0.0]), torch.tensor(1.0), 'zoh')
        tensor([0.5000,    inf])
    """
    check_choice('b_disc', b_disc, ('euler', 'zoh'))
    real_part, delta_max = _broadcast(real_part, delta_max)
    stable = real_part < 0
    horizon = -1 / torch.where(stable, real_part, -1.0)
    if b_disc == 'euler':
        lost = -torch.expm1(delta_max * real_part)
        moves = lost > 0
        series = delta_max / torch.where(moves, lost, 1.0)
        horizon = torch.where(moves, series, horizon)
    return torch.where(stable, horizon, torch.inf)


def step_gain(
    real_part: Tensor, delta_max: Tensor, b_disc: str = 'euler'
) -> Tensor:
    """Largest ``|B_bar / B|`` of one step.

    Args:
        real_part (Tensor): Real part of lambda, any sign, 1/step.
        delta_max (Tensor): Largest step size, >= 0, steps; broadcast.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.

    Returns:
        Tensor: In steps: ``delta_max``, or for zero-order hold the integral
        of ``exp(s Re lambda)`` over the step.
    """
    check_choice('b_disc', b_disc, ('euler', 'zoh'))
    real_part, delta_max = _broadcast(real_part, delta_max)
    if b_disc == 'euler':
        return delta_max
    x = delta_max * real_part
    flat = x == 0
    ratio = torch.expm1(x) / torch.where(flat, 1.0, x)
    return delta_max * torch.where(flat, 1.0, ratio)


class ScanRanges(NamedTuple):
    """Largest absolute values inside a scan and of its output."""

    drive: Tensor  # (dim, N), |B_bar u|
    state: Tensor  # (dim, N), |h|
    y: Tensor  # (dim,)


def scan_ranges(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    b_disc: str = 'euler',
) -> ScanRanges:
    """Bound drive, state and output of a selective scan of any length.

    Args:
        u (Tensor): (dim,), largest absolute value of the input.
        delta (Tensor): (dim,), largest step size, steps.
        A (Tensor): (dim, N), eigenvalues, real or complex, 1/step. Complex
            ones double the real part of the output, as the scan does.
        B (Tensor): (dim, N), largest absolute value.
        C (Tensor): (dim, N), largest absolute value.
        D (Tensor): (dim,), skip weight.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.

    Returns:
        ScanRanges: State and output are infinite where a driven eigenvalue
        has no negative real part.

    Source: induction over the tokens; see docs/ranges.md.

    Example:
        >>> one = torch.ones(1, 1)
        >>> found = scan_ranges(one[0], one[0], -one, one, one, one[0], 'zoh')
        >>> found.state.item(), found.y.item()
        (1.0, 2.0)
    """
    real, step = _real(A), delta[:, None]
    force = B * u[:, None]
    drive = force * step_gain(real, step, b_disc)
    gain = mode_gain(real, step, b_disc)
    # no drive, no state; not read, no output: never 0 * inf
    state = torch.where(force == 0, 0.0, force * gain)
    read = torch.where(C == 0, 0.0, C * state).sum(1)
    y = (2 if A.is_complex() else 1) * read + D.abs() * u
    return ScanRanges(drive, state, y)


def _real(A: Tensor) -> Tensor:
    return A.real if A.is_complex() else A


def _broadcast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    shape = (first + second).shape
    return first.expand(shape), second.expand(shape)
