"""Parametrizations: from parameters to state matrices, without tensors."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from mmstabvim.layers.state_matrix.rules import (
    EigenvalueClamping,
    Rule,
    SpectralNormalization,
    check_compatible,
    largest_in_direction,
)
from mmstabvim.stability.state.normalization import (
    discrete_shift,
    radius_scale,
)

Params = tuple[Tensor, ...]
P = TypeVar('P', bound=Params)


class ScanMatrices(NamedTuple):
    """Diagonal A, and B and C in its basis, as the scan takes them."""

    A: Tensor  # (directions, d_inner, modes)
    B: Tensor  # (directions, batch, length, groups, modes)
    C: Tensor  # as B


class Obeying(NamedTuple, Generic[P]):
    """Parameters that obey rules, and what it took."""

    params: P
    report: dict[str, Tensor]
    """Details of a full projection: ``projected_matrices``, ``blend`` and
    ``fit_residual``, one value for each direction."""


class Parametrization(ABC, Generic[P]):
    """Map parameters to the state matrices of one layer.

    There are ``rows`` matrices, those of one direction after those of
    another, of ``d_state`` eigenvalues each. A parametrization has options,
    and no tensors: parameters are given to each of its methods.

    Args:
        directions (int): Directions of the layer, a divisor of the rows.
    """

    names: tuple[str, ...]
    """Names of the parameters, in their order."""

    multiplicity: int = 1
    """Eigenvalues that a stored one stands for: 2 for a conjugate pair."""

    numbers: int = 1
    """Real numbers in an entry of B_t and C_t, as projected from a token."""

    granularities: ClassVar[tuple[str, ...]] = ('channel', 'layer')
    """Choices for what shares one scale under spectral normalization."""

    can_be_unstable: bool = True
    """Some parameters give an eigenvalue with positive real part."""

    def __init__(self, directions: int = 1) -> None:
        self.directions = directions

    # ------------------------------------------------- of a parametrization

    @abstractmethod
    def pack(self, tensors: Sequence[Tensor]) -> P:
        """Name the parameters."""

    @abstractmethod
    def eigenvalues(self, params: P) -> Tensor:
        """Compute the eigenvalues (rows, d_state), 1/step."""

    @abstractmethod
    def scale(self, params: P, divisor: Tensor) -> P:
        """Return parameters of ``A / divisor``; divisor (rows,), >= 1."""

    @abstractmethod
    def shift(self, params: P, shift: Tensor) -> P:
        """Return parameters of ``A - shift I``; shift (rows,), >= 0."""

    @abstractmethod
    def clamp(self, params: P, rule: EigenvalueClamping) -> P:
        """Return parameters whose eigenvalues obey the rule."""

    @abstractmethod
    def project(
        self,
        params: P,
        rules: Sequence[Rule],
        dtype: torch.dtype | None = None,
        name: str = '',
    ) -> Obeying[P]:
        """Return parameters that obey rules together, differentiable.

        Args:
            params (tuple): Float32 or wider.
            rules (Sequence[Rule]): At least one, in the order in which they
                act.
            dtype (torch.dtype, optional): That the result will be stored
                in. Defaults to None, for that of ``params``.
            name (str): Of the matrix, for errors.
        """

    @abstractmethod
    def scan_matrices(
        self, params: P, B: Tensor, C: Tensor
    ) -> ScanMatrices | None:
        """Return A, B and C for the scan; None without usable eigenbasis.

        Args:
            params (tuple): Float32 or wider.
            B (Tensor): (directions, batch, length, numbers * d_state).
            C (Tensor): As ``B``.
        """

    # --------------------------------------------------------- for everyone

    def dense(self, params: P) -> Tensor:
        """Compute the matrices (rows, d_state, d_state), 1/step."""
        return torch.diag_embed(self.eigenvalues(params))

    def radius(self, params: P, radius: str = 'exact') -> Tensor:
        """Compute spectral radii (rows,), 1/step, or bounds if asked for."""
        return self.eigenvalues(params).abs().amax(-1)

    def abscissa(self, params: P) -> Tensor:
        """Compute the largest real parts (rows,), 1/step."""
        return self.eigenvalues(params).real.amax(-1)

    def magnitude(self, params: P) -> Tensor | None:
        """Compute what rounding of an eigenvalue is relative to, (rows,)."""
        return None

    def condition(self, params: P) -> Tensor:
        """Compute condition numbers of the eigenvectors, (rows,), >= 1."""
        return params[0].new_ones(len(params[0]))

    def distance(self, params: P, real: float) -> float:
        """Measure how far a parameter is from an eigenvalue's real part.

        Args:
            params (tuple): Any dtype.
            real (float): 1/step.

        Returns:
            float: Distance of the nearest eigenvalue in the parameter's own
            unit; 0 if one has that real part or more, infinite if none ever
            can.
        """
        return max(real - float(self.abscissa(params).amax()), 0.0)

    def normalize(self, params: P, rule: SpectralNormalization) -> P:
        """Return parameters whose spectral radius obeys the rule."""
        self.check_granularity(rule)
        layer = rule.granularity == 'layer'
        if rule.domain == 'continuous':
            radius = self.radius(params, rule.radius)
            rho_max = rule.rho_max
            if layer:
                radius = largest_in_direction(radius, self.directions)
                if isinstance(rho_max, Tensor):
                    rho_max = largest_in_direction(rho_max, self.directions)
            divisor = radius_scale(radius, rho_max, detach=rule.detach_scale)
            return self.scale(params, divisor)
        abscissa = self.abscissa(params)
        if layer:
            abscissa = largest_in_direction(abscissa, self.directions)
        shift = discrete_shift(
            abscissa,
            float(rule.rho_max),
            rule.delta_ref,
            scale=self.magnitude(params),
            detach=rule.detach_scale,
        )
        return self.shift(params, shift)

    def check_granularity(self, rule: SpectralNormalization) -> None:
        """Raise ValueError where nothing can share a scale as asked."""
        if rule.granularity not in self.granularities:
            raise ValueError(
                f'granularity must be one of {self.granularities} for '
                f'{type(self).__name__}, got {rule.granularity!r}'
            )

    def obey(self, params: P, rule: Rule) -> P:
        """Return parameters that obey one rule, differentiable."""
        if isinstance(rule, SpectralNormalization):
            return self.normalize(params, rule)
        return self.clamp(params, rule)

    def check_reparametrizations(self, rules: Sequence[Rule]) -> None:
        """Raise ValueError if rules cannot act in the forward pass."""
        check_compatible(rules)

    def fresh(self) -> Parametrization[P]:
        """Copy it without what it remembers of parameters."""
        return copy.copy(self)

    def split(self, rows: Tensor) -> Tensor:
        """View (rows, ...) as (directions, rows of a direction, ...)."""
        return rows.unflatten(0, (self.directions, -1))

    def __repr__(self) -> str:
        """Show the options."""
        shown = ', '.join(f'{k}={v!r}' for k, v in self.options().items())
        return f'{type(self).__name__}({shown})'

    def options(self) -> dict[str, Any]:
        """Options of the parametrization, to be shown."""
        return dict(directions=self.directions)
