"""A soft bound on the spectral norms of weights."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmstabvim.registry import MODELS
from mmstabvim.stability.inputs import real_dtype
from mmstabvim.stability.weights.layers import (
    START_STEPS,
    WeightGroup,
    WeightPart,
    evaluating,
    find_layers,
    group_layers,
    weight_parts,
)
from mmstabvim.stability.weights.norms import power_iteration


@MODELS.register_module()
class SpectralConstraintLoss(nn.Module):
    """``sum max(0, norm(W) - max_norm)**2`` over the weights of layers.

    The norm is the largest singular value, by power iteration that goes on
    from step to step, an estimate from below; for depthwise convolutions
    along a sequence, and for patches that overlap, a bound. Where no norm is
    too large the loss and its gradient are zero. Unlike
    :class:`mmstabvim.WeightSpectralNormHook` it leaves weights free to exceed
    the bound where the task needs it.

    Args:
        layers (Sequence[str]): Name patterns of linear and convolution
            layers: whole parts of the dotted name, ``*`` for anything.
            Defaults to the projections of a Vision Mamba.
        max_norm (float): Norm above which a weight is penalized, > 0.
            Defaults to 1.0.
        loss_weight (float): Factor, >= 0. Defaults to 0.01.
        steps (int): Power iterations per training step, >= 1. Defaults to 1.

    Raises:
        ValueError: If an argument is out of range, or with the first batch a
            pattern matches no layer.

    Source: the penalty form of arXiv:1705.10941.
    """

    key = 'loss_spectral_norm'

    def __init__(
        self,
        layers: Sequence[str] = ('in_proj', 'x_proj', 'dt_proj', 'out_proj'),
        max_norm: float = 1.0,
        loss_weight: float = 0.01,
        steps: int = 1,
    ) -> None:
        super().__init__()
        if not max_norm > 0:
            raise ValueError(f'max_norm must be positive, got {max_norm!r}')
        if not loss_weight >= 0:
            raise ValueError(
                f'loss_weight must be at least 0, got {loss_weight!r}'
            )
        if steps < 1:
            raise ValueError(f'steps must be at least 1, got {steps}')
        self.patterns, self.max_norm = layers, max_norm
        self.loss_weight, self.steps = loss_weight, steps
        self._groups: list[WeightGroup] = []
        self._saved: dict[str, Tensor] = {}

    def forward(self, model: nn.Module) -> Tensor:
        """The weighted loss of a model, a scalar, float32 or wider.

        Args:
            model (nn.Module): The same at each call.
        """
        norms = torch.cat(list(self.norms(model).values()))
        return self.loss_weight * (norms - self.max_norm).relu().square().sum()

    def norms(self, model: nn.Module) -> dict[tuple[str, ...], Tensor]:
        """Norms of the weights, differentiable, by the names of the layers.

        Args:
            model (nn.Module): The same at each call.

        Returns:
            dict[tuple[str, ...], Tensor]: (layers,) for layers of one shape.
        """
        layers = find_layers(model, self.patterns)
        if not self._groups:
            self._start(layers)
        kind = next(model.parameters()).device.type
        with torch.autocast(kind, enabled=False):
            return {g.names: self._norms(g, layers) for g in self._groups}

    def _start(self, layers: Mapping[str, nn.Module]) -> None:
        self._groups = group_layers(layers)
        for group in self._groups:
            group.estimate(START_STEPS)
            group.take_vectors(self._saved)

    def _norms(
        self, group: WeightGroup, layers: Mapping[str, nn.Module]
    ) -> Tensor:
        parts: dict[str, WeightPart] = {}
        for name, layer in layers.items():
            parts |= weight_parts(name, layer, _weight(layer))
        weights = torch.stack([parts[name].view() for name in group.names])
        weights = weights.to(real_dtype(weights))
        operator = group.operator
        if operator.depthwise:
            return operator.norms(weights)
        matrices = operator.matrices(weights)
        frozen = matrices.detach()
        group.u, _, _ = power_iteration(frozen, group.u, self.steps)
        # its gradient is u v^T, as that of the singular value
        rows = (group.u.unsqueeze(-2) @ matrices).squeeze(-2)
        sigma = torch.linalg.vector_norm(rows, dim=-1)
        return operator.factor * sigma.amax(-1)

    def get_extra_state(self) -> dict[str, Any]:
        """Vectors of the power iteration by the names of the layers."""
        vectors = {}
        for group in self._groups:
            vectors.update(group.vectors)
        return {name: u.cpu().clone() for name, u in vectors.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from the vectors of a checkpoint."""
        self._saved = state
        for group in self._groups:
            group.take_vectors(state)


def _weight(layer: nn.Module) -> Tensor:
    """The weight with its gradient; reading it makes no step of training."""
    if not parametrize.is_parametrized(layer, 'weight'):
        return cast(Tensor, layer.weight)
    with evaluating(cast(Any, layer).parametrizations.weight):
        return cast(Tensor, layer.weight)
