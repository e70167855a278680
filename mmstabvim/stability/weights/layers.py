"""Layers selected by name, and norms of their weights in batches."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmstabvim.stability.inputs import check_choice, real_dtype
from mmstabvim.stability.state.normalization import radius_scale
from mmstabvim.stability.weights.norms import (
    conv_norm_bound,
    overlap_factor,
    power_iteration,
    spectral_norm,
    start_vector,
)

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
RULES = ('bound', 'divide')
START_STEPS = 15
"""Steps of power iteration of a start vector before its first use."""


def find_layers(
    model: nn.Module, patterns: Sequence[str]
) -> dict[str, nn.Module]:
    """Find the linear and convolution layers whose names match.

    A pattern matches whole parts of a dotted name. ``'in_proj'`` matches
    every layer of that name and every layer below a module of that name,
    ``'layers.0.mixer'`` all layers of one mixer. ``*`` stands for anything,
    dots too, so ``'*head'`` finds ``head.fc`` and ``decode_head.conv_seg``.

    Args:
        model (nn.Module): Any model.
        patterns (Sequence[str]): Name patterns, at least one.

    Returns:
        dict[str, nn.Module]: Layers by name, in the order of
        ``named_modules``; only the first of layers that share a weight.

    Raises:
        ValueError: If there is no pattern, or one matches no such layer; near
            names are listed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> list(find_layers(model, ['*']))
        ['0', '2']
    """
    if isinstance(patterns, str) or not patterns:
        raise ValueError(
            f'layers must be a list of name patterns, got {patterns!r}'
        )
    known = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, KINDS) or _own_operator(module)
    }
    chosen = set()
    for pattern in patterns:
        found = {name for name in known if _matches(name, pattern)}
        if not found:
            raise ValueError(_no_match(model, known, pattern))
        chosen |= found
    owners: dict[int, str] = {}
    for name in known:
        if name in chosen:
            owners.setdefault(id(weight_parameter(known[name])), name)
    return {name: known[name] for name in owners.values()}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(f'.{name}.', f'*.{pattern}.*')


def _no_match(
    model: nn.Module, known: Mapping[str, nn.Module], pattern: str
) -> str:
    """Message with the names nearest to a pattern."""
    parts = dict.fromkeys(part for name in known for part in name.split('.'))
    names = [part for part in parts if not part.isdigit()]
    near = difflib.get_close_matches(pattern, [*names, *known], 5, 0.5)
    return (
        f'layers: the pattern {pattern!r} matches no linear or convolution '
        f'layer of {type(model).__name__}; '
        + (f'near names: {near}' if near else f'names: {names}')
    )


def weight_parameter(layer: nn.Module) -> nn.Parameter:
    """Parameter behind a layer's weight, parametrized or not."""
    if parametrize.is_parametrized(layer, 'weight'):
        parametrization = cast(Any, layer).parametrizations.weight
        return cast(nn.Parameter, parametrization.original)
    return cast(nn.Parameter, layer.weight)


@dataclass(frozen=True)
class Operator:
    """Linear map of a layer's weight, which determines its norm.

    Args:
        groups (int): Number of matrices in the weight, one for each group of
            channels.
        factor (float): The norm of the layer is at most this many times the
            norm of the matrices, and equal to it where the factor is 1.
        depthwise (bool): The layer convolves each channel along a sequence.
        directions (int): Number of directions whose weights are stored in
            one, each a layer of its own.
    """

    groups: int = 1
    factor: float = 1.0
    depthwise: bool = False
    directions: int = 1

    def matrices(self, weights: Tensor) -> Tensor:
        """Unfold weights (batch, out, in, ...) to (batch, groups, m, n)."""
        return torch.unflatten(weights, 1, (self.groups, -1)).flatten(3)

    def norms(self, weights: Tensor) -> Tensor:
        """Norms of the layers, exact or proven bounds.

        Args:
            weights (Tensor): (batch, *weight), weights of one shape.

        Returns:
            Tensor: (batch,), at least float32, computed in float64,
            differentiable.
        """
        if self.depthwise:
            return conv_norm_bound(weights.flatten(2)).amax(-1)
        return self.factor * spectral_norm(self.matrices(weights)).amax(-1)

    def start(self, weights: Tensor) -> Tensor:
        """Start vectors of power iteration, (batch, groups, m)."""
        batch, out = weights.shape[:2]
        size = out // self.groups
        return start_vector(size, weights).expand(batch, self.groups, size)


def _own_operator(layer: nn.Module) -> Operator | None:
    """Return what a layer of another kind says of itself."""
    operator = getattr(layer, 'weight_operator', None)
    return operator if isinstance(operator, Operator) else None


class WeightPart(NamedTuple):
    """Weight of one direction of a layer.

    It is viewed anew at each use, as the data of a parameter may be replaced.
    """

    whole: Tensor  # (directions * out, ...)
    number: int
    directions: int

    def view(self) -> Tensor:
        """Return the weight, (out, ...), which can be changed in place."""
        split = torch.unflatten(self.whole, 0, (self.directions, -1))
        return split[self.number]


def weight_parts(
    name: str, layer: nn.Module, weight: Tensor
) -> dict[str, WeightPart]:
    """Split a layer's weight into its directions.

    Args:
        name (str): Name of the layer.
        layer (nn.Module): Linear or convolution, or one with an attribute
            ``weight_operator``.
        weight (Tensor): Its weight.

    Returns:
        dict[str, WeightPart]: By name; that of the layer where there is one
        direction, ``'name.0'`` and so on else.
    """
    count = operator_of(layer).directions
    if count == 1:
        return {name: WeightPart(weight, 0, 1)}
    return {f'{name}.{k}': WeightPart(weight, k, count) for k in range(count)}


def operator_of(layer: nn.Module) -> Operator:
    """Describe the linear map of a layer's weight.

    Args:
        layer (nn.Module): Linear or convolution, or one that describes
            itself by an attribute ``weight_operator``.

    Returns:
        Operator: Its norms are exact for a linear layer and for patches that
        do not overlap, up to 0.07 % too large for a depthwise convolution
        along a sequence, and bounds for other convolutions.

    Raises:
        TypeError: If the layer is of another kind.
        ValueError: If it pads its input with anything but zeros.
    """
    if isinstance(layer, nn.Linear):
        return Operator()
    own = _own_operator(layer)
    if own is not None:
        return own
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(
            'layer must be linear or a convolution, got '
            f'{type(layer).__name__}'
        )
    if layer.padding_mode != 'zeros':
        raise ValueError(
            f"padding_mode must be 'zeros' for a bound of the norm, got "
            f'{layer.padding_mode!r}'
        )
    alone = layer.groups == layer.in_channels == layer.out_channels
    if alone and isinstance(layer, nn.Conv1d) and layer.stride == (1,):
        return Operator(depthwise=True)
    factor = overlap_factor(layer.kernel_size, layer.stride, layer.dilation)
    return Operator(layer.groups, factor)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode within a context."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@torch.no_grad()
def current_weight(layer: nn.Module) -> Tensor:
    """Weight in use by a layer, without a step of power iteration.

    Reading a parametrized ``layer.weight`` during training would advance the
    iteration.
    """
    if not parametrize.is_parametrized(layer, 'weight'):
        return cast(Tensor, layer.weight)
    parametrization = cast(Any, layer).parametrizations.weight
    with evaluating(parametrization):
        return cast(Tensor, parametrization())


def layer_norms(layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Spectral norm of each layer's weight, exact or a proven bound.

    Args:
        layers (Mapping[str, nn.Module]): Layers by name; see
            :func:`find_layers`.

    Returns:
        dict[str, float]: Norms by the same names. They are exact for linear
        layers and for patches that do not overlap. For depthwise convolutions
        along a sequence they hold for any length and are at most 0.07 % too
        large. For other convolutions they are bounds. Biases do not matter.

    Raises:
        TypeError: If a layer is neither linear nor a convolution.
        ValueError: If a weight is not finite.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.constant_(layer.weight, 0.5)
        >>> layer_norms({'head': layer})
        {'head': 1.0}
    """
    norms: dict[str, float] = {}
    for group in group_layers(layers):
        norms.update(zip(group.names, group.norms().tolist(), strict=True))
    return {name: norms[name] for name in weight_names(layers)}


def weight_names(layers: Mapping[str, nn.Module]) -> list[str]:
    """Name the weights of layers, one for each direction.

    Args:
        layers (Mapping[str, nn.Module]): Layers by name.
    """
    return [
        direction
        for name, layer in layers.items()
        for direction in weight_parts(name, layer, weight_parameter(layer))
    ]


def group_layers(layers: Mapping[str, nn.Module]) -> list['WeightGroup']:
    """Group layers whose weights have the same shape and operator.

    Args:
        layers (Mapping[str, nn.Module]): Layers by name; see
            :func:`find_layers`.

    Returns:
        list[WeightGroup]: Groups that together hold each direction of each
        layer once.

    Raises:
        TypeError: If a layer is neither linear nor a convolution.
    """
    groups: dict[tuple[Any, ...], dict[str, WeightPart]] = {}
    for name, layer in layers.items():
        operator = replace(operator_of(layer), directions=1)
        parts = weight_parts(name, layer, current_weight(layer))
        for direction, part in parts.items():
            weight = part.view()
            key = operator, weight.shape, weight.dtype, weight.device
            groups.setdefault(key, {})[direction] = part
    return [WeightGroup(key[0], parts) for key, parts in groups.items()]


class WeightGroup:
    """Weights of one shape, whose norms are computed in one batch.

    The power iteration goes on from call to call.

    Args:
        operator (Operator): Linear map of the weights.
        parts (Mapping[str, WeightPart]): Weights by the names of their layers
            and directions; they are projected in place, without gradient.
    """

    def __init__(
        self, operator: Operator, parts: Mapping[str, WeightPart]
    ) -> None:
        self.operator = operator
        self.names, self.parts = tuple(parts), tuple(parts.values())
        self.u = operator.start(self._stack()).clone()

    def _stack(self) -> Tensor:
        stacked = torch.stack([part.view().detach() for part in self.parts])
        return stacked.to(real_dtype(stacked))

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Vectors of the power iteration by name, empty if it is not used."""
        if self.operator.depthwise:
            return {}
        return dict(zip(self.names, self.u, strict=True))

    def take_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        """Continue from these vectors, where a weight has one."""
        for row, name in zip(self.u, self.names, strict=True):
            if name in vectors:
                row.copy_(vectors[name])

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Exact norms or proven bounds, (weights,).

        Raises:
            ValueError: If a weight is not finite, with the layer's name.
        """
        stacked = self._stack()
        self.check_finite(stacked.flatten(1))
        with torch.autocast(stacked.device.type, enabled=False):
            return self.operator.norms(stacked)

    @torch.no_grad()
    def estimate(self, steps: int = 1) -> Tensor:
        """Estimate norms by further steps of power iteration, (weights,).

        Estimates are from below, and NaN where a weight is not finite.
        Depthwise convolutions get their bounds, which cost as little.
        """
        stacked = self._stack()
        with torch.autocast(stacked.device.type, enabled=False):
            if self.operator.depthwise:
                return self.operator.norms(stacked)
            matrices = self.operator.matrices(stacked)
            self.u, sigma, _ = power_iteration(matrices, self.u, steps)
        return self.operator.factor * sigma.amax(-1)

    def check_finite(self, values: Tensor) -> None:
        """Raise ValueError for the first row of ``values`` not finite."""
        finite = torch.isfinite(values.reshape(len(self.names), -1)).all(-1)
        if not finite.all():
            name = self.names[int(finite.int().argmin())]
            raise ValueError(f'{name}.weight has a NaN or an infinity')

    @torch.no_grad()
    def divide_(self, divisors: Tensor) -> None:
        """Divide each weight by its divisor, in place."""
        for part, divisor in zip(self.parts, divisors, strict=True):
            part.view().div_(divisor)


def project_norms_(
    groups: Sequence[WeightGroup],
    bounds: Mapping[str, float],
    rule: str,
    steps: int | None = 1,
) -> None:
    """Project weights so that their norms obey a rule, in place.

    Args:
        groups (Sequence[WeightGroup]): Weights to project.
        bounds (Mapping[str, float]): Bounds by the names of the layers, > 0.
        rule (str): Divisor of each weight: ``'bound'`` for ``max(1, norm /
            bound)``, ``'divide'`` for ``norm / bound``.
        steps (int, optional): Steps of power iteration, or None for exact
            norms. Defaults to 1.

    Raises:
        ValueError: If a weight is not finite, with the layer's name, or
            ``rule`` is unknown.

    Source: arXiv:1802.05957, Eq. 8 (``'divide'`` with bound 1).
    """
    check_choice('rule', rule, RULES)
    norms = [
        group.norms() if steps is None else group.estimate(steps)
        for group in groups
    ]
    # one wait for the device, not one for each shape
    if not torch.isfinite(torch.cat(norms)).all():
        for group, values in zip(groups, norms, strict=True):
            group.check_finite(values)
    for group, values in zip(groups, norms, strict=True):
        bound = values.new_tensor([bounds[name] for name in group.names])
        group.divide_(_divisors(values, bound, rule))


def _divisors(
    norms: Tensor, bounds: Tensor, rule: str, slack: float = 1e-6
) -> Tensor:
    """Divisors of weights, 1 within the slack and where the norm is 0.

    The slack keeps a second application from changing a weight again by
    rounding.
    """
    ratio = norms / bounds
    if rule == 'bound':
        return radius_scale(ratio, 1.0, slack)
    keep = ((ratio - 1).abs() <= slack) | (ratio == 0)
    return torch.where(keep, 1.0, ratio)
