"""Free parameters of reparametrized state matrices, in checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmstabvim.engine.weight_reparametrization import (
    PREFIXES,
    STATES,
    RawStates,
)
from mmstabvim.layers.state_matrix import StateMatrix


@torch.no_grad()
def separate(
    checkpoint: dict[str, Any], matrices: Mapping[str, StateMatrix]
) -> RawStates:
    """Put the parameters in use in place of the free ones.

    The checkpoint then is, without hooks, the model that was trained.

    Args:
        checkpoint (dict[str, Any]): About to be saved; changed.
        matrices (Mapping[str, StateMatrix]): Of the model, by name; those
            without a rule in the forward pass are left as they are.

    Returns:
        RawStates: The free parameters.
    """
    return {
        key: {
            name: _exchange(matrix, checkpoint[key], f'{PREFIXES[key]}{name}.')
            for name, matrix in matrices.items()
            if matrix.reparametrizations
        }
        for key in STATES
        if key in checkpoint
    }


def _exchange(
    matrix: StateMatrix, state: dict[str, Any], prefix: str
) -> dict[str, Tensor]:
    names = matrix.parametrization.names
    free = {name: state[prefix + name] for name in names}
    used = matrix.in_use(tuple(free.values()))
    for name, value in zip(names, used, strict=False):
        state[prefix + name] = value.to(free[name].dtype)
    return {name: value.detach().clone() for name, value in free.items()}


def join(
    state: dict[str, Any], raw: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Put free parameters in place of those in use into a loaded state."""
    for name, values in raw.items():
        for key, value in values.items():
            state[f'{name}.{key}'] = value


@torch.no_grad()
def restore(
    matrices: Mapping[str, StateMatrix],
    raw: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Copy free parameters into those matrices that have some."""
    for name in matrices.keys() & raw.keys():
        for key, value in raw[name].items():
            matrices[name].get_parameter(key).copy_(value)
