"""Parametrized weights in optimizers and checkpoints."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mmstabvim.stability.weights.parametrizations import (
    load_raw,
    put_raw,
    take_raw,
)

STATES = ('state_dict', 'ema_state_dict')
PREFIXES = {'state_dict': '', 'ema_state_dict': 'module.'}

RawStates = dict[str, dict[str, dict[str, Tensor]]]
"""Free parameters by state of the checkpoint, layer and name."""


def train_with(
    optimizers: Iterable[Optimizer], weight: Tensor, gain: nn.Parameter
) -> None:
    """Let the optimizer train a gain with the settings of its weight.

    It joins the weight's group, so schedules and saved states keep their
    layout. Where the weight is not trained the gain is not either.

    Args:
        optimizers (Iterable[Optimizer]): Optimizers of the runner.
        weight (Tensor): Parameter of the model.
        gain (nn.Parameter): New parameter.
    """
    gain.requires_grad_(weight.requires_grad)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(p is weight for p in group['params']):
                group['params'].append(gain)
                return
    gain.requires_grad_(False)


def separate(
    checkpoint: dict[str, Any], layers: Mapping[str, nn.Module]
) -> RawStates:
    """Put plain weights in place of free parameters into a checkpoint.

    Args:
        checkpoint (dict[str, Any]): About to be saved; changed.
        layers (Mapping[str, nn.Module]): Parametrized layers by name.

    Returns:
        RawStates: The free parameters.
    """
    return {
        key: {
            name: take_raw(layer, checkpoint[key], f'{PREFIXES[key]}{name}.')
            for name, layer in layers.items()
        }
        for key in STATES
        if key in checkpoint
    }


def join(
    checkpoint: dict[str, Any], raw: Mapping[str, dict[str, Tensor]]
) -> None:
    """Put free parameters in place of plain weights into a loaded state."""
    for name, values in raw.items():
        put_raw(values, checkpoint['state_dict'], f'{name}.')


def live_and_average(raw: RawStates, averaging: bool) -> list[dict[str, Any]]:
    """Return the free parameters of the model and of its average.

    Args:
        raw (RawStates): Entry of a checkpoint.
        averaging (bool): True for a run with an ``EMAHook``, which saves
            averages as the model's state, and the model as the average's.

    Returns:
        list[dict[str, Any]]: Two, by layer.
    """
    average = raw.get('state_dict', {})
    live = raw.get('ema_state_dict', average) if averaging else average
    return [live, average]


def restore(
    layers: Mapping[str, nn.Module], raw: Mapping[str, dict[str, Tensor]]
) -> None:
    """Load free parameters into those layers that have some."""
    for name in layers.keys() & raw.keys():
        load_raw(layers[name], raw[name])
