"""Bound the spectral radius of the state matrices during training."""

import dataclasses
from typing import Any

import torch
from mmengine.runner import Runner

from mmstabvim.engine.hooks.stabilizer_hook import (
    StabilizerHook,
    find_matrices,
)
from mmstabvim.layers.state_matrix import (
    Rule,
    SpectralNormalization,
    StateMatrix,
)
from mmstabvim.registry import HOOKS

CHECKPOINT_KEY = 'spectral_normalization'


@HOOKS.register_module()
class SpectralNormalizationHook(StabilizerHook):
    """``A <- A / max(1, radius(A) / rho_max)`` after each optimizer step.

    A bound on the spectral radius limits how fast a mode grows or decays. It
    does not make an unstable matrix stable: dividing by a positive number
    keeps the signs of the real parts. For that use ``domain='discrete'`` or
    :class:`EigenvalueClampingHook`. The rule is exact in the parameters, the
    identity bit by bit where it holds already, and idempotent.

    Args:
        rho_max (float | str): Largest radius allowed; in the continuous
            domain > 0 in 1/step, or ``'init'`` for each matrix's radius at
            the start of training, which is kept in the checkpoint; in the
            discrete domain in (0, 1]. Note that the usual initialization has
            radius d_state. Defaults to 1.0.
        domain (str): ``'continuous'``, or ``'discrete'`` for the matrix
            ``exp(delta_ref A)``. Defaults to ``'continuous'``.
        granularity (str): What shares one scale: ``'channel'``, ``'layer'``
            or, for full matrices, ``'block'``. Defaults to ``'channel'``.
        delta_ref (float): Step size of the discrete domain, in steps.
            Defaults to 0.1.
        radius (str): ``'exact'`` or ``'gelfand'``, an upper bound. Defaults
            to ``'exact'``.
        mode (str): ``'project'`` in place after each step, or ``'reparam'``
            in every forward pass. Defaults to ``'project'``.
        detach_scale (bool): With ``'reparam'``, let no gradient flow through
            the scale. Defaults to False.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        rho_max: float | str = 1.0,
        domain: str = 'continuous',
        granularity: str = 'channel',
        delta_ref: float = 0.1,
        radius: str = 'exact',
        mode: str = 'project',
        detach_scale: bool = False,
    ) -> None:
        self.from_start = rho_max == 'init'
        if isinstance(rho_max, str) and not self.from_start:
            raise ValueError(
                f"rho_max must be a positive number or 'init', got {rho_max!r}"
            )
        if self.from_start and domain != 'continuous':
            raise ValueError(
                "rho_max='init' needs the continuous domain: in the discrete "
                'one the radius depends on the step size'
            )
        self.rule = SpectralNormalization(
            1.0 if isinstance(rho_max, str) else rho_max,
            domain,
            granularity,
            delta_ref,
            radius,
            detach_scale,
        )
        super().__init__([self.rule], mode)
        self._start: dict[str, torch.Tensor] = {}
        self._loaded: dict[str, torch.Tensor] = {}

    def before_train(self, runner: Runner) -> None:
        """Note the initial radii, then start."""
        if self.from_start and not self._start:
            self._start = self._loaded if runner._resume else {}
        if self.from_start and not self._start:
            matrices = find_matrices(runner, type(self).__name__)
            self._start = _radii(matrices)
        super().before_train(runner)

    def before_val(self, runner: Runner) -> None:
        """Take the radii of the checkpoint outside of training."""
        self._start = self._start or self._loaded
        super().before_val(runner)

    def rules_for(self, name: str, matrix: StateMatrix) -> list[Rule]:
        """Return the rule, with the layer's initial radii if they count."""
        if not self.from_start:
            return self.rules
        if name not in self._start:
            raise RuntimeError(
                f"rho_max='init': the checkpoint has no radius for {name!r} "
                'from the start of its training'
            )
        radii = self._start[name].to(matrix.free[0].device)
        return [dataclasses.replace(self.rule, rho_max=radii)]

    def why_idle(self, matrix: StateMatrix) -> str | None:
        """Name stable parametrizations under the discrete radius 1."""
        parametrization = matrix.parametrization
        always_stable = not parametrization.can_be_unstable
        if (
            always_stable
            and self.rule.domain == 'discrete'
            and self.rule.rho_max == 1
        ):
            kind = type(parametrization).__name__
            return (
                f'{kind} has negative real parts only, so the radius of '
                'exp(delta A) is below 1 always'
            )
        return None

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the radii of the start."""
        super().before_save_checkpoint(runner, checkpoint)
        if self._start:
            checkpoint[CHECKPOINT_KEY] = {
                name: radii.cpu() for name, radii in self._start.items()
            }

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the radii of the checkpoint until it is known who asks."""
        super().after_load_checkpoint(runner, checkpoint)
        self._loaded = dict(checkpoint.get(CHECKPOINT_KEY, {}))


@torch.no_grad()
def _radii(matrices: dict[str, StateMatrix]) -> dict[str, torch.Tensor]:
    return {
        name: matrix.eigenvalues(matrix.free).abs().amax(-1)
        for name, matrix in matrices.items()
    }
