"""What every parametrization of the state matrix offers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmstabvim.layers.state_matrix.constraints import (
    Constraint,
    EigenvalueClamping,
    SpectralNormalization,
    check_together,
)
from mmstabvim.stability.state.normalization import (
    discrete_shift,
    radius_scale,
)

Params = tuple[Tensor, ...]


class ScanMatrices(NamedTuple):
    """Diagonal A, and B and C in its basis, as the scan takes them."""

    A: Tensor  # (d_inner, modes)
    B: Tensor  # (batch, length, groups, modes)
    C: Tensor  # as B


class StateMatrix(nn.Module):
    """Continuous-time state matrix A of one direction of one layer.

    There are ``rows`` matrices of ``d_state`` eigenvalues; each serves
    ``d_inner / rows`` neighbouring channels.

    A constraint (:mod:`.constraints`) maps parameters to parameters. Applied
    in place it projects them; listed in ``reparametrizations`` it is part of
    every forward pass, and gradients flow through it to the raw parameters.

    Args:
        d_inner (int): Channels.
        d_state (int): Eigenvalues of each matrix.
    """

    multiplicity = 1
    """Eigenvalues that a stored one stands for: 2 for a conjugate pair."""

    numbers = 1
    """Real numbers in an entry of B_t and C_t, as projected from a token."""

    granularities: tuple[str, ...] = ('channel', 'layer')
    """What may share one scale under spectral normalization."""

    can_be_unstable = True
    """Whether some parameters give an eigenvalue with positive real part."""

    def __init__(self, d_inner: int, d_state: int) -> None:
        super().__init__()
        self.d_inner, self.d_state = d_inner, d_state
        self.reparametrizations: list[Constraint] = []

    # ------------------------------------------------- of a parametrization

    def raw(self) -> Params:
        """The parameters themselves."""
        return tuple(self.parameters(recurse=False))

    def eigenvalues_of(self, params: Params) -> Tensor:
        """Eigenvalues (rows, d_state), 1/step, real or complex."""
        raise NotImplementedError

    def dense_of(self, params: Params) -> Tensor:
        """Matrices (rows, d_state, d_state), 1/step."""
        return torch.diag_embed(self.eigenvalues_of(params))

    def scaled(self, params: Params, scale: Tensor) -> Params:
        """Parameters of ``A / scale``; scale (rows,), at least 1."""
        raise NotImplementedError

    def shifted(self, params: Params, shift: Tensor) -> Params:
        """Parameters of ``A - shift I``; shift (rows,), at least 0."""
        raise NotImplementedError

    def clamp(self, params: Params, rule: EigenvalueClamping) -> Params:
        """Parameters whose eigenvalues obey the rule."""
        raise NotImplementedError

    def scan_matrices(self, B: Tensor, C: Tensor) -> ScanMatrices | None:
        """A, B and C for the scan; None if A has no usable eigenbasis.

        Args:
            B (Tensor): (batch, length, numbers * d_state), of each token.
            C (Tensor): As ``B``.
        """
        raise NotImplementedError

    # --------------------------------------------------------- for everyone

    def normalize(self, params: Params, rule: SpectralNormalization) -> Params:
        """Parameters whose spectral radius obeys the rule."""
        if rule.granularity not in self.granularities:
            raise ValueError(
                f'granularity must be one of {self.granularities} for '
                f'{type(self).__name__}, got {rule.granularity!r}'
            )
        layer = rule.granularity == 'layer'
        if rule.domain == 'continuous':
            radius = self.radius_of(params, rule.radius)
            rho_max = rule.rho_max
            if layer:
                radius = radius.amax().expand_as(radius)
                if isinstance(rho_max, Tensor):
                    rho_max = rho_max.amax()
            scale = radius_scale(radius, rho_max, detach=rule.detach_scale)
            return self.scaled(params, scale)
        abscissa = self.eigenvalues_of(params).real.amax(-1)
        if layer:
            abscissa = abscissa.amax().expand_as(abscissa)
        limit = float(rule.rho_max)
        shift = discrete_shift(
            abscissa,
            limit,
            rule.delta_ref,
            scale=self.magnitude_of(params),
            detach=rule.detach_scale,
        )
        return self.shifted(params, shift)

    def magnitude_of(self, params: Params) -> Tensor | None:
        """What the rounding of an eigenvalue is relative to, (rows,)."""
        return None

    def radius_of(self, params: Params, radius: str) -> Tensor:
        """Spectral radius (rows,), 1/step; a bound where one is asked for."""
        return self.eigenvalues_of(params).abs().amax(-1)

    def effective(self) -> Params:
        """The parameters that the forward pass uses, float32 or wider."""
        return self.obeying(
            tuple(map(_widen, self.raw())), self.reparametrizations
        )

    def obeying(
        self,
        params: Params,
        rules: Sequence[Constraint],
        dtype: torch.dtype | None = None,
        name: str = '',
    ) -> Params:
        """Parameters that obey rules together, differentiable.

        Args:
            params (tuple): As :meth:`raw`, float32 or wider.
            rules (Sequence[Constraint]): In the order in which they act.
            dtype (torch.dtype, optional): That the result will be stored
                in. Defaults to None, for that of ``params``.
            name (str): Of the matrix, for errors.
        """
        raise NotImplementedError

    def eigenvalues(self) -> Tensor:
        """Eigenvalues in use, (rows, d_state), 1/step."""
        with autocast_off(self):
            return self.eigenvalues_of(self.effective())

    def forward(self) -> Tensor:
        """As :meth:`eigenvalues`."""
        return self.eigenvalues()

    def raw_eigenvalues(self) -> Tensor:
        """Eigenvalues of the raw parameters, (rows, d_state), 1/step."""
        with autocast_off(self):
            return self.eigenvalues_of(tuple(map(_widen, self.raw())))

    def dense(self) -> Tensor:
        """Matrices in use, (rows, d_state, d_state), 1/step."""
        with autocast_off(self):
            return self.dense_of(self.effective())

    def raw_dense(self) -> Tensor:
        """Matrices of the raw parameters, (rows, d_state, d_state)."""
        with autocast_off(self):
            return self.dense_of(tuple(map(_widen, self.raw())))

    def condition(self) -> Tensor:
        """Largest condition number of an eigenbasis, a scalar, >= 1."""
        return self.raw()[0].new_ones(())

    def spectral_radius(self) -> Tensor:
        """Largest modulus of an eigenvalue in use, (rows,), 1/step."""
        return self.eigenvalues().abs().amax(-1)

    def spectral_abscissa(self) -> Tensor:
        """Largest real part of an eigenvalue in use, (rows,), 1/step."""
        return self.eigenvalues().real.amax(-1)

    @torch.no_grad()
    def distance_to(self, real: float) -> float:
        """How far a parameter is from an eigenvalue with this real part.

        Args:
            real (float): 1/step.

        Returns:
            float: Of the nearest eigenvalue, in the parameter's own unit;
            0 if one has it or more, infinite if none ever can.
        """
        return max(real - float(self.raw_eigenvalues().real.amax()), 0.0)

    @torch.no_grad()
    def spectral_normalize_(self, **options: object) -> None:
        """Apply :class:`.constraints.SpectralNormalization` in place."""
        self.apply_(SpectralNormalization(**options))  # type: ignore[arg-type]

    @torch.no_grad()
    def clamp_eigenvalues_(self, **options: object) -> None:
        """Apply :class:`.constraints.EigenvalueClamping` in place."""
        self.apply_(EigenvalueClamping(**options))  # type: ignore[arg-type]

    @torch.no_grad()
    def apply_(self, *rules: Constraint, name: str = '') -> None:
        """Project the parameters in place; unchanged bits where rules hold.

        Args:
            *rules (Constraint): All hold together afterwards, for what is
                stored.
            name (str): Of the matrix, for errors.

        Raises:
            ValueError: If a parameter is not finite, rules contradict each
                other, or the parameters' precision cannot hold a bound.
        """
        check_finite({name: self})
        with autocast_off(self):
            old = self.raw()
            rules = tuple(sorted(rules, key=lambda rule: rule.order))
            new = self.obeying(
                tuple(map(_widen, old)), rules, old[0].dtype, name
            )
            for parameter, value in zip(old, new, strict=True):
                parameter.copy_(value)

    def check_reparametrizations(self, name: str = '') -> None:
        """Raise ValueError if rules cannot act together in the forward pass.

        Args:
            name (str): Of the matrix, for the error.
        """
        try:
            check_together(self.reparametrizations)
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from error

    @torch.no_grad()
    def in_use(self, params: Params) -> Params:
        """What the forward pass would use for other raw parameters."""
        with autocast_off(self):
            rules = self.reparametrizations
            return self.obeying(tuple(map(_widen, params)), rules)

    @property
    def is_frozen(self) -> bool:
        """Whether a parameter is not trained: such a matrix is left alone."""
        return not all(p.requires_grad for p in self.raw())

    def extra_repr(self) -> str:
        """Show the sizes, and what is applied in the forward pass."""
        rules = ''.join(f', {rule}' for rule in self.reparametrizations)
        return f'{self.d_inner}, {self.d_state}{rules}'


def autocast_off(module: nn.Module) -> torch.autocast:
    """Eigenvalues are never computed in half precision."""
    device = next(module.parameters()).device
    return torch.autocast(device.type, enabled=False)


def state_matrices(model: nn.Module) -> dict[str, StateMatrix]:
    """The state matrices of a model by their names.

    Args:
        model (nn.Module): Any model.

    Returns:
        dict[str, StateMatrix]: In the order of ``named_modules``.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StateMatrix)
    }


def check_finite(matrices: Mapping[str, StateMatrix]) -> None:
    """Raise unless all parameters are finite; waits for the device once.

    Args:
        matrices (Mapping[str, StateMatrix]): By their names.

    Raises:
        ValueError: Naming the first matrix that has a NaN or an infinity.
    """
    finite = [
        torch.stack([torch.isfinite(p).all() for p in matrix.raw()]).all()
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
