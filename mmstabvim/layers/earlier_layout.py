"""Weights whose directions were modules of their own, as up to 0.1."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    'conv1d.weight': 'conv1d.weight',
    'conv1d.bias': 'conv1d.bias',
    'x_proj.weight': 'ssm.x_proj.weight',
    'dt_proj.weight': 'ssm.dt_proj.weight',
    'dt_proj.bias': 'ssm.dt_bias',
    'D': 'ssm.D',
}
_DIRECTION = re.compile(r'((?:.*\.)?)directions\.(\d+)\.(.+)')
_BASIS = 'state_matrix.basis.'


def new_name(name: str) -> tuple[str, int] | None:
    """Translate the name of an earlier weight.

    Args:
        name (str): For instance ``'mixer.directions.1.D'``.

    Returns:
        tuple[str, int] | None: Its name now and its direction, such as
        ``('mixer.ssm.D', 1)``; None if it is called as today.
    """
    match = _DIRECTION.fullmatch(name)
    if match is None:
        return None
    leaf = match[3]
    if leaf not in _NAMES and not leaf.startswith('state_matrix'):
        return None
    new = _NAMES.get(leaf, f'ssm.{leaf}')
    return match[1] + new, int(match[2])


def join_directions(name: str, parts: list[Any]) -> Any:
    """Join the values of the directions of one weight.

    Args:
        name (str): Its name now.
        parts (list): A value for each direction: tensors, or numbers that
            are all the same.

    Raises:
        ValueError: If values that must be the same differ.
    """
    first = parts[0]
    shared = (
        _BASIS in name or not isinstance(first, Tensor) or first.dim() == 0
    )
    if shared:
        same = (
            torch.equal(first, x) if isinstance(first, Tensor) else first == x
            for x in parts
        )
        if not all(same):
            raise ValueError(
                f'{name}: the directions of the earlier layout differ, where '
                'they have one value now'
            )
        return first
    if name.endswith('conv1d.weight') and first.dim() == 3:
        parts = [x.squeeze(1) for x in parts]
    return torch.cat(parts)


def stack_directions(state: dict[str, Any], prefix: str = '') -> bool:
    """Rename weights of the earlier layout and join directions, in place.

    Args:
        state (dict[str, Any]): A state dict.
        prefix (str): Start of the names to be renamed. Defaults to ``''``.

    Returns:
        bool: False if there were none.

    Raises:
        ValueError: If a direction is missing.
    """
    found: dict[str, dict[int, Any]] = {}
    for name in [name for name in state if name.startswith(prefix)]:
        new = new_name(name)
        if new is not None:
            found.setdefault(new[0], {})[new[1]] = state.pop(name)
    for name, parts in found.items():
        if set(parts) != set(range(len(parts))):
            raise ValueError(
                f'{name}: the checkpoint has the directions {sorted(parts)}'
            )
        state[name] = join_directions(
            name, [parts[k] for k in range(len(parts))]
        )
    return bool(found)


def has_directions(state: Mapping[str, Any]) -> bool:
    """Tell whether a state dict has the earlier layout."""
    return any(new_name(name) is not None for name in state)
