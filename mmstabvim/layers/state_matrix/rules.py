"""Rules that a state matrix can be made to obey.

A rule is a set of numbers. A parametrization maps parameters to parameters
that obey it: :meth:`.matrix.StateMatrix.apply_` writes them back, a
reparametrization computes with them in every forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mmstabvim.stability.inputs import check_choice
from mmstabvim.stability.state.clamping import continuous_margin

DOMAINS = ('continuous', 'discrete')
GRANULARITIES = ('channel', 'layer', 'block')
RADII = ('exact', 'gelfand')
METHODS = ('eig', 'schur', 'shift')
GRADIENTS = ('ste', 'clamp')


@dataclass(frozen=True)
class SpectralNormalization:
    """Bound the spectral radius of A, or of ``exp(delta_ref A)``.

    Continuous: ``A / max(1, radius / rho_max)``. Discrete: the matrix that
    takes the state to the next token, ``exp(delta_ref A)``, is divided so,
    which is ``A - s I`` with ``s = max(0, abscissa - ln(rho_max) /
    delta_ref)``; for ``rho_max = 1`` it is the same for every step size.

    Args:
        rho_max (float | Tensor): Largest radius allowed, > 0, in 1/step
            (continuous) or dimensionless, at most 1 (discrete); a tensor
            (rows,) has one for each matrix. Defaults to 1.0.
        domain (str): ``'continuous'`` or ``'discrete'``. Defaults to
            ``'continuous'``.
        granularity (str): What shares one scale: a matrix (``'channel'``),
            all matrices of a direction of a layer (``'layer'``), or each
            block and the low-rank term by itself (``'block'``; says nothing
            about the radius of their sum). Defaults to ``'channel'``.
        delta_ref (float): Step size of the discrete domain, in steps.
            Matters for ``rho_max < 1`` only. Defaults to 0.1.
        radius (str): ``'exact'``, or ``'gelfand'``: an upper bound without
            eigenvalues, at most a few percent too large. Defaults to
            ``'exact'``.
        detach_scale (bool): In the forward pass, take scale or shift as a
            constant: no gradient flows through them. Defaults to False.

    Raises:
        ValueError: If an argument is out of range.

    Source: arXiv:1802.05957 for the idea; Gelfand's formula for the bound.
    """

    order: ClassVar[int] = 0
    """Rules with a smaller one act first."""

    rho_max: float | Tensor = 1.0
    domain: str = 'continuous'
    granularity: str = 'channel'
    delta_ref: float = 0.1
    radius: str = 'exact'
    # not in the repr, which tells how a checkpoint was projected
    detach_scale: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_choice('domain', self.domain, DOMAINS)
        check_choice('granularity', self.granularity, GRANULARITIES)
        check_choice('radius', self.radius, RADII)
        check_positive('delta_ref', self.delta_ref)
        discrete = self.domain == 'discrete'
        if discrete and self.granularity == 'block':
            raise ValueError(
                "granularity 'block' needs the continuous domain: a shift "
                'moves all blocks alike'
            )
        if isinstance(self.rho_max, Tensor):
            if discrete:
                raise ValueError(
                    'rho_max must be a number in the discrete domain, got a '
                    'tensor'
                )
            return
        check_positive('rho_max', self.rho_max)
        if discrete and self.rho_max > 1:
            raise ValueError(
                'rho_max must be at most 1 in the discrete domain, got '
                f'{self.rho_max!r}'
            )

    @property
    def abscissa_limit(self) -> float | None:
        """Largest real part that the rule leaves, 1/step; None if any."""
        if self.domain == 'continuous':
            return None
        return math.log(self.rho_max) / self.delta_ref


@dataclass(frozen=True)
class EigenvalueClamping:
    """Bound the real parts of the eigenvalues of A.

    Continuous: ``Re <= -eps``. Discrete: ``|exp(delta_ref lambda)| <= 1 -
    margin`` with the phase kept, which is the same rule with ``eps =
    -ln(1 - margin) / delta_ref``.

    Args:
        domain (str): ``'continuous'`` or ``'discrete'``. Defaults to
            ``'continuous'``.
        eps (float): Distance kept from instability, >= 0, 1/step; continuous
            domain. Defaults to 0.01.
        margin (float): Share that is forgotten per reference step, in (0,
            1); discrete domain. Defaults to 1e-3.
        delta_ref (float): Reference step of the discrete domain, in steps.
            Defaults to 0.1, the largest step at initialization.
        lambda_max (float, optional): Also ``Re >= -lambda_max``, a floor
            against modes that forget at once; for a full matrix as well as
            its structure can hold it. Defaults to None.
        method (str, optional): For a full matrix: ``'shift'`` moves all
            eigenvalues alike, which keeps block and low-rank structure
            exactly; ``'eig'`` clamps in the eigenbasis, ``'schur'`` in the
            real Schur form, and both are fitted to the structure and then
            shifted: for analysis, not for training. Diagonal matrices clamp
            each eigenvalue whatever the method. Defaults to None, for
            ``'shift'``.
        grad (str): In the forward pass, the gradient of a clamped
            eigenvalue: ``'ste'`` passes it straight through, so that a
            parameter beyond its bound can come back; ``'clamp'`` is the
            plain one, zero. A full matrix has the gradient of the shift.
            Defaults to ``'ste'``.
        condition_max (float | str, optional): For a full matrix: largest
            condition number of its eigenvectors, without which a negative
            real part promises little; ``'auto'`` is the matrix's
            ``kappa_max``, None leaves it out. Defaults to ``'auto'``.

    Raises:
        ValueError: If an argument is out of range.
    """

    order: ClassVar[int] = 1

    domain: str = 'continuous'
    eps: float = 0.01
    margin: float = 1e-3
    delta_ref: float = 0.1
    lambda_max: float | None = None
    method: str | None = None
    # not in the repr, which tells how a checkpoint was projected
    grad: str = field(default='ste', repr=False)
    condition_max: float | str | None = 'auto'

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_choice('domain', self.domain, DOMAINS)
        if self.method is not None:
            check_choice('method', self.method, METHODS)
        check_choice('grad', self.grad, GRADIENTS)
        if not self.eps >= 0:
            raise ValueError(f'eps must be at least 0, got {self.eps!r}')
        if not 0 < self.margin < 1:
            raise ValueError(
                f'margin must be between 0 and 1, got {self.margin!r}'
            )
        check_positive('delta_ref', self.delta_ref)
        bound = self.condition_max
        if not (bound in (None, 'auto') or _at_least_one(bound)):
            raise ValueError(
                "condition_max must be a number from 1 on, 'auto' or None, "
                f'got {bound!r}'
            )
        if self.lambda_max is not None and not self.lambda_max >= self.floor:
            raise ValueError(
                f'lambda_max must be at least the distance {self.floor!r} '
                f'that eps or margin asks for, got {self.lambda_max!r}'
            )

    @property
    def floor(self) -> float:
        """Least distance of the real parts from zero, 1/step."""
        if self.domain == 'continuous':
            return self.eps
        return continuous_margin(self.margin, self.delta_ref)

    @property
    def abscissa_limit(self) -> float:
        """Largest real part that the rule leaves, 1/step."""
        return -self.floor


Rule = SpectralNormalization | EigenvalueClamping


def check_compatible(rules: Sequence[Rule]) -> tuple[float, float]:
    """Check that rules do not contradict each other.

    Args:
        rules (Sequence[Rule]): That are to hold together.

    Returns:
        tuple[float, float]: Smallest and largest real part that they leave,
        1/step; infinite where there is no such bound.

    Raises:
        ValueError: If no eigenvalue obeys all of them.
    """
    limits = [r.abscissa_limit for r in rules]
    ceiling = min((x for x in limits if x is not None), default=math.inf)
    clampings = [r for r in rules if isinstance(r, EigenvalueClamping)]
    floors = [-r.lambda_max for r in clampings if r.lambda_max is not None]
    floor = max(floors, default=-math.inf)
    if floor > ceiling:
        raise ValueError(
            'the rules contradict each other: real parts of at most '
            f'{ceiling:g} and of at least {floor:g} (lambda_max)'
        )
    for rule in rules:
        if isinstance(rule, SpectralNormalization):
            limit = rule.rho_max
            continuous = rule.domain == 'continuous'
            number = not isinstance(limit, Tensor)
            if continuous and number and limit < -ceiling:
                raise ValueError(
                    'the rules contradict each other: a spectral radius of '
                    f'at most {limit:g} and real parts of at most {ceiling:g}'
                )
    return floor, ceiling


def largest_in_direction(x: Tensor, directions: int) -> Tensor:
    """Give each matrix the largest value of its direction of a layer.

    Args:
        x (Tensor): (directions * rows, ...).
        directions (int): Directions of the layer.

    Returns:
        Tensor: As ``x``.
    """
    split = x.unflatten(0, (directions, -1))
    return split.amax(1, keepdim=True).expand_as(split).flatten(0, 1)


def _at_least_one(value: object) -> bool:
    return isinstance(value, int | float) and value >= 1


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless the value is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f'{name} must be positive and finite, got {value!r}')
