"""Parametrized layers whose weights obey a rule on their norms.

They are built on :mod:`torch.nn.utils.parametrize`. The free parameter is
``layer.parametrizations.weight.original``, and ``layer.weight`` is computed
from it in every forward pass, with gradients through the norm. Where the rule
divides by the norm of one matrix, PyTorch's own ``spectral_norm`` computes it.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from mmstabvim.stability.inputs import check_choice, real_dtype
from mmstabvim.stability.state.normalization import radius_scale
from mmstabvim.stability.weights.layers import (
    START_STEPS,
    Operator,
    evaluating,
    operator_of,
)
from mmstabvim.stability.weights.norms import power_iteration

PARAMETRIZED_RULES = ('bound', 'divide', 'learned')
RAW = 'parametrizations.weight.'
"""Prefix of the free parameters' names, after the layer's name."""


class EstimatedNorm(nn.Module):
    """Norm of a weight by power iteration, one step per training forward.

    Depthwise convolutions get their bound instead. The vectors are buffers;
    evaluation does not change them. The norm has the gradient ``u v^T``.

    Args:
        operator (Operator): Linear map of the weight.
        weight (Tensor): The weight, for shape, dtype and device.
        steps (int): Power iterations per forward pass. Defaults to 1.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self, operator: Operator, weight: Tensor, steps: int = 1
    ) -> None:
        super().__init__()
        self.operator = replace(operator, directions=1)
        self.directions, self.steps = operator.directions, steps
        if not operator.depthwise:
            matrix = self._matrix(weight.detach())
            self.register_buffer('u', self._start(weight).clone())
            self.register_buffer('v', torch.zeros_like(matrix[..., 0, :]))
        self.restart(weight)

    def _split(self, weight: Tensor) -> Tensor:
        """View the weight with a first axis of directions."""
        return torch.unflatten(weight, 0, (self.directions, -1))

    def _join(self, x: Tensor) -> Tensor:
        """Leave out the first axis where there is one direction."""
        return x[0] if self.directions == 1 else x

    def _start(self, weight: Tensor) -> Tensor:
        return self._join(self.operator.start(self._split(weight)))

    def _matrix(self, weight: Tensor) -> Tensor:
        wide = weight.to(real_dtype(weight))
        return self._join(self.operator.matrices(self._split(wide)))

    @torch.no_grad()
    def restart(self, weight: Tensor) -> None:
        """Restart power iteration, for another weight."""
        if not self.operator.depthwise:
            self.u.copy_(self._start(weight))
            self._iterate(self._matrix(weight), START_STEPS)

    def _iterate(self, matrix: Tensor, steps: int) -> None:
        u, _, v = power_iteration(matrix.detach(), self.u, steps)
        self.u.copy_(u)
        self.v.copy_(v)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the norm, a scalar or (directions,), float32 or wider."""
        if self.operator.depthwise:
            return self._join(self.operator.norms(self._split(weight)))
        matrix = self._matrix(weight)
        if self.training:
            self._iterate(matrix, self.steps)
        # the graph keeps them, and the next forward pass changes the buffers
        u, v = self.u.clone(), self.v.clone()
        sigma = (u[..., None, :] @ matrix @ v[..., None]).amax((-3, -2, -1))
        return self.operator.factor * sigma


def rows_of(values: Tensor, weight: Tensor) -> Tensor:
    """Repeat the value of each direction for its rows of a weight.

    Args:
        values (Tensor): Scalar or (directions,).
        weight (Tensor): (directions * out, ...).

    Returns:
        Tensor: A scalar, or what broadcasts against ``weight``.
    """
    if values.dim() == 0:
        return values
    rows = values.repeat_interleave(len(weight) // len(values))
    return rows.view(-1, *[1] * (weight.dim() - 1))


class BoundedWeight(nn.Module):
    """Parametrization ``weight / max(1, norm / max_norm)``.

    Args:
        norm (EstimatedNorm): Norm of the weight.
        max_norm (Tensor): Largest norm allowed, > 0, scalar or (directions,).
    """

    max_norm: Tensor

    def __init__(self, norm: EstimatedNorm, max_norm: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer('max_norm', max_norm, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Bound the norm of a weight, same shape and dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            ratio = self.norm(weight) / self.max_norm
            return (weight / rows_of(radius_scale(ratio, 1.0), weight)).to(
                weight.dtype
            )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight: one within the bound maps to itself."""
        return weight


class UnitWeight(nn.Module):
    """Parametrization ``weight / norm``; a weight of zeros stays.

    Args:
        norm (EstimatedNorm): Norm of the weight.
    """

    def __init__(self, norm: EstimatedNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, weight: Tensor) -> Tensor:
        """Scale a weight to norm 1, same shape and dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            norm = self.norm(weight)
            norm = torch.where(norm == 0, 1.0, norm)
            return (weight / rows_of(norm, weight)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight: one of norm 1 maps to itself."""
        return weight


class WithoutAutocast(nn.Module):
    """Wrapper of PyTorch's spectral normalization that turns autocast off.

    Autocast would run its products in half precision.

    Args:
        inner (nn.Module): Parametrization to wrap.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, weight: Tensor) -> Tensor:
        """Apply the wrapped parametrization."""
        with torch.autocast(weight.device.type, enabled=False):
            return cast(Tensor, self.inner(weight))

    @torch.no_grad()
    def restart(self, weight: Tensor) -> None:
        """Restart power iteration, from fixed vectors."""
        matrices = Operator().matrices(weight.flatten(1)[None])[0]
        start = Operator().start(matrices)[0]
        u, _, v = power_iteration(matrices, start, START_STEPS)
        cast(Tensor, self.inner._u).copy_(u[0])
        cast(Tensor, self.inner._v).copy_(v[0])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight: one of norm 1 maps to itself."""
        return weight


class Gain(nn.Module):
    """Parametrization ``gain * weight``.

    Args:
        gain (Tensor): Scalar or (directions,); a parameter is learned.
    """

    gain: Tensor

    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        if isinstance(gain, nn.Parameter):
            self.gain = gain
        else:
            self.register_buffer('gain', gain)

    def forward(self, weight: Tensor) -> Tensor:
        """Multiply by the gain, same shape and dtype."""
        return (rows_of(self.gain, weight) * weight).to(weight.dtype)


def parametrize_norm(
    layer: nn.Module,
    rule: str = 'bound',
    max_norm: float | Sequence[float] | None = 1.0,
    steps: int = 1,
    gain: nn.Parameter | None = None,
) -> None:
    """Make a layer's weight obey a rule on its norm in every forward pass.

    The parameter object stays, as ``parametrizations.weight.original``, so
    an optimizer that has it needs only a learned gain in addition. Each
    training forward pass makes a step of power iteration, evaluation none.
    The layer also loads states of a plain layer; with ``'learned'`` it then
    computes with the same weight.

    Args:
        layer (nn.Module): Linear or convolution.
        rule (str): ``'bound'`` for ``W / max(1, norm / max_norm)``,
            ``'divide'`` for ``max_norm W / norm`` (arXiv:1802.05957, Eq. 8),
            ``'learned'`` for ``gain W / norm`` with a trained gain
            (arXiv:2303.06296). Defaults to ``'bound'``.
        max_norm (float | Sequence[float], optional): Bound, norm, or initial
            value of the gain, > 0, for all directions of the layer or for
            each; None for the norm of the weight. Defaults to 1.0.
        steps (int): Power iterations per forward pass, >= 1. Defaults to 1.
        gain (nn.Parameter, optional): Learned gain, a scalar, or
            (directions,) for a layer with several; its value is overwritten.
            Defaults to None, for a new parameter.

    Raises:
        TypeError: If the layer is neither linear nor a convolution.
        ValueError: If an argument is out of range, the weight is parametrized
            already, or zero where it is to be divided by its norm.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.eye_(layer.weight)
        >>> parametrize_norm(layer, 'bound', max_norm=0.5)
        >>> layer.weight.detach()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    check_choice('rule', rule, PARAMETRIZED_RULES)
    if max_norm is not None and not torch.all(torch.as_tensor(max_norm) > 0):
        raise ValueError(f'max_norm must be positive, got {max_norm}')
    if parametrize.is_parametrized(layer, 'weight'):
        raise ValueError('the weight is parametrized already')
    weight = cast(Tensor, layer.weight).detach()
    if not bool(weight.any()) and (rule != 'bound' or max_norm is None):
        raise ValueError('the weight is zero: it has no norm to divide by')
    operator = operator_of(layer)
    norm = EstimatedNorm(operator, weight, steps).train(layer.training)
    target = _targets(max_norm, norm, weight)
    if rule == 'bound':
        bounded = BoundedWeight(norm, target)
        parametrize.register_parametrization(layer, 'weight', bounded)
    else:
        _normalize(layer, norm)
    if rule == 'learned':
        if gain is None:
            gain = nn.Parameter(torch.empty_like(target, dtype=weight.dtype))
        _append(layer, Gain(gain))
        gain.data.copy_(target)
        if max_norm is None:
            _keep_weight(_parametrizations(layer), gain)
    elif rule == 'divide' and bool((target != 1).any()):
        _append(layer, Gain(target.to(weight.dtype)))
    register = cast(Any, layer)._register_load_state_dict_pre_hook
    register(_accept_plain, with_module=True)


@torch.no_grad()
def _targets(
    max_norm: float | Sequence[float] | None,
    norm: EstimatedNorm,
    weight: Tensor,
) -> Tensor:
    """Bring bounds to a scalar, or (directions,) where there are several."""
    shape = () if norm.directions == 1 else (norm.directions,)
    if max_norm is None:
        parts = torch.unflatten(weight, 0, (norm.directions, -1))
        return norm.operator.norms(parts).reshape(shape)
    wide = torch.as_tensor(max_norm, dtype=real_dtype(weight))
    return (
        wide.to(weight.device).expand(norm.directions).reshape(shape).clone()
    )


def _normalize(layer: nn.Module, norm: EstimatedNorm) -> None:
    """Divide the weight by its norm, by PyTorch's own function if it fits."""
    if norm.operator != Operator() or norm.directions > 1:
        unit = UnitWeight(norm)
        parametrize.register_parametrization(layer, 'weight', unit)
        return
    weight = cast(Tensor, layer.weight).detach()
    devices = [weight.device] if weight.is_cuda else []
    # its start vectors are random, and replaced
    with torch.random.fork_rng(devices):
        spectral_norm(layer, n_power_iterations=norm.steps)
    steps = _parametrizations(layer)
    steps[0] = WithoutAutocast(steps[0])
    cast(WithoutAutocast, steps[0]).restart(weight)


def _append(layer: nn.Module, gain: Gain) -> None:
    # register_parametrization would compute the weight to check it
    gain.train(layer.training)
    _parametrizations(layer).append(gain)


def _parametrizations(layer: nn.Module) -> parametrize.ParametrizationList:
    return cast(
        parametrize.ParametrizationList,
        cast(Any, layer).parametrizations.weight,
    )


# ------------------------------------------------------------------- states


@torch.no_grad()
def take_raw(
    layer: nn.Module, state: dict[str, Any], prefix: str
) -> dict[str, Tensor]:
    """Replace a layer's free parameters in a state by the plain weight.

    The state then fits a model without parametrizations, and gives the same
    outputs there.

    Args:
        layer (nn.Module): Parametrized layer.
        state (dict[str, Any]): State of a model with such a layer; changed in
            place.
        prefix (str): Prefix of the layer's keys, with the final dot.

    Returns:
        dict[str, Tensor]: Removed entries, for :func:`put_raw` and
        :func:`load_raw`.
    """
    start = prefix + RAW
    names = [name for name in state if name.startswith(start)]
    raw = {name.removeprefix(start): state.pop(name) for name in names}
    parametrization = _parametrizations(layer)
    with evaluating(parametrization):
        state[f'{prefix}weight'] = functional_call(parametrization, raw, ())
    return raw


def put_raw(
    raw: Mapping[str, Tensor], state: dict[str, Any], prefix: str
) -> None:
    """Undo :func:`take_raw`, in place."""
    state.pop(f'{prefix}weight', None)
    for name, value in raw.items():
        state[prefix + RAW + name] = value


def load_raw(layer: nn.Module, raw: Mapping[str, Tensor]) -> None:
    """Load free parameters into a parametrized layer."""
    _parametrizations(layer).load_state_dict(raw)


def _accept_plain(
    layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Replace a plain weight in a state to be loaded by free parameters."""
    weight = state.pop(f'{prefix}weight', None)
    if weight is None or any(name.startswith(prefix + RAW) for name in state):
        return
    for name, value in _raw_of(layer, weight).items():
        state[prefix + RAW + name] = value


@torch.no_grad()
def _raw_of(layer: nn.Module, weight: Tensor) -> dict[str, Any]:
    """Free parameters that represent a weight."""
    twin = copy.deepcopy(_parametrizations(layer))
    twin.original.copy_(weight)
    for module in twin.modules():
        if isinstance(module, (EstimatedNorm, WithoutAutocast)):
            module.restart(twin.original)
    gains = [module.gain for module in twin if isinstance(module, Gain)]
    if gains and isinstance(gains[0], nn.Parameter):
        _keep_weight(twin, gains[0])
    return twin.state_dict()


@torch.no_grad()
def _keep_weight(
    parametrization: parametrize.ParametrizationList, gain: nn.Parameter
) -> None:
    """Set the gain so that the computed weight equals its original."""
    gain.fill_(1.0)
    with evaluating(parametrization):
        shape = (max(gain.numel(), 1), -1)
        wanted = torch.reshape(parametrization.original, shape).norm(dim=1)
        found = parametrization().reshape(shape).norm(dim=1)
        gain.copy_((wanted / found).reshape(gain.shape))
