"""Weights in a checkpoint file: find them, choose a part, name the file."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmstabvim.loading.names import move_metadata
from mmstabvim.loading.report import LoadReport, shorten

SOURCE = 'mmstabvim.source'
"""Entry of a state dict's metadata that names its file."""

_WEIGHT_KEYS = (
    'state_dict',
    'model',
    'model_state_dict',
    'module',
    'net',
    'model_ema',
    'state_dict_ema',
    'ema_state_dict',
    'ema',
)
"""Keys under which training tools keep weights, in order of preference."""


def find_weights(
    checkpoint: Mapping[str, Any],
) -> tuple[Mapping[str, Any], list[str]]:
    """Find the weights in the content of a checkpoint file.

    Args:
        checkpoint (Mapping): Weights by name, or a dict with such a dict
            under a key.

    Returns:
        tuple[Mapping, list[str]]: The weights, and notes on the choice.

    Raises:
        ValueError: If there are none, or several under unknown keys.
    """
    if any(isinstance(value, Tensor) for value in checkpoint.values()):
        return checkpoint, []
    found = [key for key, value in checkpoint.items() if holds_weights(value)]
    known = [key for key in _WEIGHT_KEYS if key in found]
    if not found or (not known and len(found) > 1):
        raise ValueError(
            'wanted weights by name, or one dict of them under a key such as '
            f'{", ".join(map(repr, _WEIGHT_KEYS[:3]))}, got the keys '
            f'{shorten(map(repr, checkpoint))}'
            + (f' with weights under {found}' if found else '')
        )
    key = (known or found)[0]
    rest = [name for name in found if name != key]
    notes = []
    if key != 'state_dict':
        notes.append(f'weights taken from {key!r}')
    if rest:
        also = ', '.join(map(repr, rest))
        notes.append(f'weights under {also} not used; those of {key!r} are')
    inner, more = find_weights(checkpoint[key])
    return inner, notes + more


def holds_weights(value: Any) -> bool:
    """Tell a dict of weights from the other dicts of a checkpoint."""
    return isinstance(value, Mapping) and any(
        isinstance(name, str) and '.' in name and isinstance(weight, Tensor)
        for name, weight in value.items()
    )


def metadata_of(state: Any) -> dict[str, Any]:
    """Copy the metadata of a state dict; empty where there are none."""
    return dict(getattr(state, '_metadata', None) or {})


def take_source(report: LoadReport, metadata: dict[str, Any]) -> None:
    """Note the file that the metadata name."""
    source = metadata.get(SOURCE)
    if source:
        report.source = source['path']
        report.notes += source['notes']


def name_source(checkpoint: Any, file: Any) -> Any:
    """Note where a checkpoint comes from, in its weights' metadata."""
    if not isinstance(checkpoint, dict):
        return checkpoint
    source = {'path': str(getattr(file, 'name', file)), 'notes': []}
    state = checkpoint.get('state_dict')
    if isinstance(state, dict):
        metadata = metadata_of(state)
        checkpoint['state_dict'] = with_metadata(state, metadata, source)
        checkpoint.setdefault('meta', {})
        return checkpoint
    named = _Checkpoint(checkpoint)
    named._metadata = OrderedDict(metadata_of(checkpoint))  # type: ignore[attr-defined]
    named._metadata[SOURCE] = source  # type: ignore[attr-defined]
    return named


def with_metadata(
    weights: Mapping[str, Any], metadata: Mapping, source: dict
) -> OrderedDict:
    """Copy a dict, with metadata that name its file."""
    copy = OrderedDict(weights)
    copy._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    copy._metadata[SOURCE] = source  # type: ignore[attr-defined]
    return copy


class _Checkpoint(OrderedDict):
    """Content of a file without the key ``state_dict``.

    mmengine's EMA hook and MMSegmentation ask for ``state_dict`` and ``meta``
    by name; converters of the toolkits look whether they are there.
    """

    def __missing__(self, key: str) -> Any:
        """Return the weights in the file, or empty metadata."""
        if key == 'state_dict':
            weights, notes = find_weights(self)
            source = dict(metadata_of(self)[SOURCE])
            source['notes'] = source['notes'] + notes
            return with_metadata(weights, metadata_of(weights), source)
        if key == 'meta':
            return {}
        raise KeyError(key)


def select(checkpoint: Mapping[str, Any], prefix: str) -> OrderedDict:
    """Take the part of a checkpoint that a prefix or a key names.

    Where neither is in the file, all of it: a bare backbone has no prefix.
    """
    key = prefix.removesuffix('.')
    state = checkpoint['state_dict']
    if holds_weights(checkpoint.get(key)):
        source = dict(metadata_of(state)[SOURCE])
        source['notes'] = [f'weights taken from {key!r}']
        inner = metadata_of(checkpoint[key])
        return with_metadata(checkpoint[key], inner, source)
    inside = {
        name.removeprefix(f'{key}.'): value
        for name, value in state.items()
        if name.startswith(f'{key}.')
    }
    metadata = metadata_of(state)
    source = dict(metadata.pop(SOURCE))
    if not inside:
        source['notes'] = [
            *source['notes'],
            f'no name begins with the prefix {prefix!r}: all were considered',
        ]
        return with_metadata(state, metadata, source)
    below = move_metadata(metadata, f'{key}.', '')
    return with_metadata(inside, below, source)
