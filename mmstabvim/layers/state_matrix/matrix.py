"""State matrices: a parametrization with parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmstabvim.layers.state_matrix.block_low_rank import BlockLowRank
from mmstabvim.layers.state_matrix.fixed_basis import FixedBasis, InputBias
from mmstabvim.layers.state_matrix.full import Full, decompose_together
from mmstabvim.layers.state_matrix.parametrization import (
    Parametrization,
    Params,
    ScanMatrices,
)
from mmstabvim.layers.state_matrix.rules import Rule
from mmstabvim.stability.state.eigenbasis import Eigenbasis, condition_number


class ParametrizedMatrix:
    """Continuous-time state matrices A of the directions of one layer.

    There are ``rows`` matrices of ``d_state`` eigenvalues, those of one
    direction after those of another; each serves ``directions * d_inner /
    rows`` neighbouring channels.

    A rule (:mod:`.rules`) listed in ``reparametrizations`` is part of every
    forward pass, and gradients flow through it to the free parameters.
    """

    parametrization: Parametrization[Any]
    reparametrizations: list[Rule]
    basis: FixedBasis | None

    @property
    def free(self) -> Params:
        """The parameters themselves, before reparametrizations."""
        raise NotImplementedError

    @property
    def directions(self) -> int:
        """Directions of the layer."""
        return self.parametrization.directions

    @property
    def multiplicity(self) -> int:
        """Eigenvalues that a stored one stands for: 2 for a pair."""
        return (
            1 if self.basis is not None else self.parametrization.multiplicity
        )

    def in_use(self, free: Params | None = None) -> Params:
        """Compute the parameters of the forward pass, float32 or wider.

        Args:
            free (tuple, optional): In place of the free parameters. Defaults
                to None.
        """
        free = self._pack(self.free if free is None else free)
        if not self.reparametrizations:
            return free
        with autocast_off(free):
            return self.parametrization.project(
                free, self.reparametrizations
            ).params

    def _pack(self, tensors: Params) -> Params:
        return self.parametrization.pack([_widen(x) for x in tensors])

    def eigenvalues(self, params: Params | None = None) -> Tensor:
        """Compute eigenvalues (rows, d_state), 1/step.

        Args:
            params (tuple, optional): Parameters, for instance ``free``.
                Defaults to None, for those in use.
        """
        params = self.in_use() if params is None else self._pack(params)
        with autocast_off(params):
            return self.parametrization.eigenvalues(params)

    def dense(self, params: Params | None = None) -> Tensor:
        """Compute matrices (rows, d_state, d_state), 1/step.

        Args:
            params (tuple, optional): As in :meth:`eigenvalues`.
        """
        params = self.in_use() if params is None else self._pack(params)
        with autocast_off(params):
            if self.basis is None:
                return self.parametrization.dense(params)
            return self.basis.dense(self.parametrization.eigenvalues(params))

    @torch.no_grad()
    def condition(self) -> Tensor:
        """Compute condition numbers of the eigenvectors, (rows,), >= 1."""
        params = self.in_use()
        if self.basis is None:
            return self.parametrization.condition(params)
        one = condition_number(self.basis.vectors)
        return one.expand(len(params[0]))

    def eigenbasis(self) -> Eigenbasis | None:
        """Decompose full matrices in use, on the CPU; None for others."""
        full = self.parametrization
        if not isinstance(full, Full):
            return None
        return full.basis(cast(BlockLowRank, self.in_use()))

    def distance_to(self, real: float) -> float:
        """Measure how far a free parameter is from an eigenvalue.

        Args:
            real (float): Real part of the eigenvalue, 1/step.

        Returns:
            float: See :meth:`.parametrization.Parametrization.distance`.
        """
        with torch.no_grad():
            free = self._pack(self.free)
            return self.parametrization.distance(free, real)

    def by_direction(self, rows: Tensor) -> Tensor:
        """View (rows, ...) as (directions, rows of a direction, ...)."""
        return self.parametrization.split(rows)

    def check_reparametrizations(self, name: str = '') -> None:
        """Raise ValueError if rules cannot act together in the forward pass.

        Args:
            name (str): Of the matrix, for the error.
        """
        rules = self.reparametrizations
        try:
            self.parametrization.check_reparametrizations(rules)
        except ValueError as error:
            raise ValueError(f'{name or "this matrix"}: {error}') from error

    @torch.no_grad()
    def apply_(self, *rules: Rule, name: str = '') -> dict[str, Tensor]:
        """Project the parameters in place; unchanged bits where rules hold.

        Args:
            *rules (Rule): All hold together afterwards, for what is stored.
            name (str): Of the matrix, for errors.

        Returns:
            dict[str, Tensor]: Details of the projection of full matrices by
            direction: ``projected_matrices``, ``blend``, ``fit_residual``.

        Raises:
            ValueError: If a parameter is not finite, rules contradict each
                other, or the parameters' precision cannot hold a bound.
        """
        check_finite({name: self})
        old = self.free
        ordered = sorted(rules, key=lambda rule: rule.order)
        if not ordered:
            return {}
        with autocast_off(old):
            new, report = self.parametrization.project(
                self._pack(old), ordered, old[0].dtype, name
            )
        for parameter, value in zip(old, new, strict=False):
            parameter.copy_(value)
        return report

    @property
    def is_frozen(self) -> bool:
        """A parameter is not trained: stabilizers leave the matrix alone."""
        return not all(p.requires_grad for p in self.free)


class StateMatrix(ParametrizedMatrix, nn.Module):
    """State matrices with parameters of their own.

    Args:
        parametrization (Parametrization): Of the matrices.
        params (tuple): Initial parameters of all directions.
        d_inner (int): Channels of a direction.
        d_state (int): Eigenvalues of each matrix.
        basis (FixedBasis, optional): Eigenbasis to which B_t and C_t change;
            it stays as it is in training. Defaults to None.
        input_bias (Tensor, optional): Initial value of a trainable constant
            in each B_t, real as B_t is projected, (numbers * d_state,).
            Defaults to None.
    """

    def __init__(
        self,
        parametrization: Parametrization[Any],
        params: Params,
        d_inner: int,
        d_state: int,
        basis: FixedBasis | None = None,
        input_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.parametrization = parametrization
        self.d_inner, self.d_state = d_inner, d_state
        self.reparametrizations: list[Rule] = []
        for name, value in zip(parametrization.names, params, strict=True):
            self.register_parameter(name, nn.Parameter(value))
        self.basis, self.input_bias = basis, None
        if input_bias is not None:
            self.input_bias = InputBias(input_bias, parametrization.directions)

    @property
    def free(self) -> Params:
        """The parameters themselves, before reparametrizations."""
        names = self.parametrization.names
        return tuple(getattr(self, name) for name in names)

    @property
    def numbers(self) -> int:
        """Real numbers in an entry of B_t and C_t, as projected."""
        return 1 if self.basis is not None else self.parametrization.numbers

    def forward(self) -> Tensor:
        """Compute the eigenvalues in use, (rows, d_state), 1/step."""
        return self.eigenvalues()

    def scan_matrices(self, B: Tensor, C: Tensor) -> ScanMatrices | None:
        """Return A, B and C for the scan; None without a usable eigenbasis.

        Args:
            B (Tensor): (directions, batch, length, numbers * d_state), as
                projected from each token.
            C (Tensor): As ``B``.
        """
        if self.input_bias is not None:
            B = self.input_bias(B)
        params = self.in_use()
        with autocast_off(params):
            if self.basis is not None:
                B, C = self.basis(B, C)
            return self.parametrization.scan_matrices(params, B, C)

    def extra_repr(self) -> str:
        """Show the sizes, and what is applied in the forward pass."""
        rules = ''.join(f', {rule}' for rule in self.reparametrizations)
        sizes = f'{self.d_inner}, {self.d_state}'
        return f'{self.parametrization}, {sizes}{rules}'


@dataclass
class StateMatrixView(ParametrizedMatrix):
    """State matrices with parameters that belong to somebody else.

    Args:
        parametrization (Parametrization): Of the matrices.
        tensors (tuple): The parameters, in the order of its names.
        d_inner (int): Channels of a direction.
        reparametrizations (list[Rule]): Rules of the forward pass. Defaults
            to none.
        basis (FixedBasis, optional): Eigenbasis of B_t and C_t. Defaults to
            None.
    """

    parametrization: Parametrization[Any]
    tensors: Params
    d_inner: int
    reparametrizations: list[Rule] = field(default_factory=list)
    basis: FixedBasis | None = None

    @property
    def free(self) -> Params:
        """The parameters themselves."""
        return self.tensors


def autocast_off(params: Params) -> torch.autocast:
    """Switch autocast off: eigenvalues are never in half precision."""
    return torch.autocast(params[0].device.type, enabled=False)


def state_matrices(model: nn.Module) -> dict[str, StateMatrix]:
    """Find the state matrices of a model.

    Args:
        model (nn.Module): Any model.

    Returns:
        dict[str, StateMatrix]: By name, in the order of ``named_modules``.

    Example:
        >>> from mmstabvim.layers import SelectiveSSM
        >>> list(state_matrices(SelectiveSSM(8)))
        ['state_matrix']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StateMatrix)
    }


@torch.no_grad()
def decompose_all(matrices: Mapping[str, ParametrizedMatrix]) -> None:
    """Diagonalize the full matrices in use among these in one batched call.

    Args:
        matrices (Mapping[str, ParametrizedMatrix]): By name.
    """
    decompose_together(
        (m.parametrization, m.in_use()) for m in matrices.values()
    )


def check_finite(matrices: Mapping[str, ParametrizedMatrix]) -> None:
    """Raise unless all parameters are finite; waits for the device once.

    Args:
        matrices (Mapping[str, ParametrizedMatrix]): By their names.

    Raises:
        ValueError: Naming the first matrix that has a NaN or an infinity.
    """
    finite = [
        torch.stack([torch.isfinite(p).all() for p in matrix.free]).all()
        for matrix in matrices.values()
    ]
    for name, fine in zip(matrices, torch.stack(finite).tolist(), strict=True):
        if not fine:
            raise ValueError(
                f'the state matrix {name or "of this layer"} has a NaN or an '
                'infinity among its parameters: it is not clamped away'
            )


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
