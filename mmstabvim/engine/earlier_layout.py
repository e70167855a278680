"""Checkpoints of trainings whose directions were modules, as up to 0.1."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mmstabvim.layers.earlier_layout import (
    join_directions,
    new_name,
    stack_directions,
)


def convert_optimizer(
    saved: Mapping[str, Any],
    old_names: Sequence[str],
    model: nn.Module,
    optimizer: Optimizer,
) -> dict[str, Any]:
    """Join what an optimizer knew of the directions of one weight.

    Args:
        saved (Mapping[str, Any]): State of the optimizer, earlier layout.
        old_names (Sequence[str]): The parameters of the earlier model, in
            its order.
        model (nn.Module): The model of today.
        optimizer (Optimizer): Of its parameters, with the same settings.

    Returns:
        dict[str, Any]: State for ``optimizer``.

    Raises:
        ValueError: If the groups do not fit, or directions have different
            settings.
    """
    parts: dict[str, list[str]] = {}
    for name in old_names:
        moved = new_name(name)
        parts.setdefault(moved[0] if moved else name, []).append(name)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        [names[id(p)] for p in group['params']]
        for group in optimizer.param_groups
    ]
    place = _places(saved['param_groups'], groups, parts, old_names)
    state: dict[int, Any] = {}
    new_groups = []
    for group in groups:
        owners = {place[old][0] for name in group for old in parts[name]}
        settings = [_settings(saved['param_groups'][i]) for i in owners]
        if any(other != settings[0] for other in settings):
            raise ValueError(
                f'the directions of {group[0]} were trained with different '
                'settings'
            )
        first = len(state)
        indices = range(first, first + len(group))
        for index, name in zip(indices, group, strict=True):
            known = [saved['state'].get(place[o][1]) for o in parts[name]]
            state[index] = _join_states(name, known)
        new_groups.append({**settings[0], 'params': list(indices)})
    filled = {index: one for index, one in state.items() if one}
    return {**saved, 'state': filled, 'param_groups': new_groups}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != 'params'}


def _places(
    saved: Sequence[Mapping[str, Any]],
    groups: Sequence[Sequence[str]],
    parts: Mapping[str, list[str]],
    old_names: Sequence[str],
) -> dict[str, tuple[int, int]]:
    """Find group and index of each earlier parameter."""
    order = {name: i for i, name in enumerate(old_names)}
    try:
        expanded = [
            sorted((old for n in g for old in parts[n]), key=order.__getitem__)
            for g in groups
        ]
    except KeyError as error:
        raise ValueError(
            f'the checkpoint has no parameter {error} of the model'
        ) from error
    if all(len(group['params']) == 1 for group in saved):
        # a group for each parameter, in the order of the model
        flat = [old for group in expanded for old in group]
        expanded = [[old] for old in sorted(flat, key=order.__getitem__)]
    sizes = [len(group['params']) for group in saved]
    if sizes != [len(group) for group in expanded]:
        raise ValueError(
            f'the optimizer of the checkpoint has groups of {sizes[:5]} ... '
            f'parameters, this training {[*map(len, expanded)][:5]} ...'
        )
    return {
        name: (i, index)
        for i, (group, members) in enumerate(zip(saved, expanded, strict=True))
        for name, index in zip(members, group['params'], strict=True)
    }


def _join_states(name: str, known: list[Any]) -> dict[str, Any]:
    """Join the optimizer's state of the directions of one parameter."""
    if not all(known):
        return {}
    return {
        key: join_directions(name, [one[key] for one in known])
        for key in known[0]
    }


def join_named(table: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a table by weight or module, joining directions.

    Args:
        table (Mapping[str, Any]): Tensors, or tables of them by parameter.

    Returns:
        dict[str, Any]: With the names of today.
    """
    joint: dict[str, Any] = {}
    found: dict[str, dict[int, Any]] = {}
    for name, value in table.items():
        moved = new_name(name)
        if moved is None:
            joint[name] = value
        else:
            found.setdefault(moved[0], {})[moved[1]] = value
    for name, by_direction in found.items():
        parts = [by_direction[k] for k in sorted(by_direction)]
        if isinstance(parts[0], dict):
            joint[name] = {
                key: join_directions(f'{name}.{key}', [p[key] for p in parts])
                for key in parts[0]
            }
        else:
            joint[name] = join_directions(name, parts)
    return joint


def convert_checkpoint(
    checkpoint: dict[str, Any], model: nn.Module, optimizer: Optimizer | None
) -> bool:
    """Bring a checkpoint of the earlier layout to that of today, in place.

    Args:
        checkpoint (dict[str, Any]): As MMEngine loads it.
        model (nn.Module): The model that is about to load.
        optimizer (Optimizer, optional): Of a training that goes on.

    Returns:
        bool: False if the checkpoint has the layout of today.

    Raises:
        ValueError: See :func:`convert_optimizer`.
    """
    weights = checkpoint.get('state_dict', {})
    buffers = {name for name, _ in model.named_buffers()}
    old_names = [
        name
        for name in weights
        if name not in buffers and '.state_matrix.basis.' not in name
    ]
    if not stack_directions(weights):
        return False
    stack_directions(checkpoint.get('ema_state_dict', {}))
    if optimizer is not None and 'optimizer' in checkpoint:
        checkpoint['optimizer'] = convert_optimizer(
            checkpoint['optimizer'], old_names, model, optimizer
        )
    if 'spectral_normalization' in checkpoint:
        key = 'spectral_normalization'
        checkpoint[key] = join_named(checkpoint[key])
    free = checkpoint.get('free_state_matrices')
    if free:
        checkpoint['free_state_matrices'] = {
            state: join_named(table) for state, table in free.items()
        }
    norms = checkpoint.get('weight_spectral_norm', {})
    if norms.get('raw'):
        raise ValueError(
            'weights that WeightSpectralNormHook had parametrized cannot go '
            'on from the earlier layout: start anew from them, with load_from'
        )
    for key, table in norms.items():
        norms[key] = {_part_name(name): x for name, x in table.items()}
    return True


def _part_name(name: str) -> str:
    """Translate the name of a direction's layer, such as of its x_proj."""
    moved = new_name(f'{name}.weight')
    if moved is None:
        return name
    return f'{moved[0].removesuffix(".weight")}.{moved[1]}'
