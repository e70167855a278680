"""Keep the step that diverged in a file, and run it again.

The file holds tensors and plain Python objects only, so that it is read
without running code (:func:`mmstabvim.checkpoint.load_checkpoint_tensors`).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmstabvim.building import build_model
from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.engine.divergence.trace import Finding, trace_step
from mmstabvim.engine.hooks.random_state_hook import (
    get_random_state,
    set_random_state,
)

_ELEMENT, _MISSING = '__data_element__', '__not_stored__'
_FIELD_SETS = ('_metainfo_fields', '_data_fields')
_PLAIN = (str, bytes, bool, int, float, complex, type(None))


def snapshot_batch(value: Any) -> Any:
    """Copy a batch without its tensors, so that fields can be changed.

    Data preprocessors put processed labels into the samples of a batch.

    Args:
        value (Any): Batch from a data loader.

    Returns:
        Any: Another batch with the same tensors.
    """
    if isinstance(value, BaseDataElement):
        copied = object.__new__(type(value))
        for name, item in vars(value).items():
            fields = name in _FIELD_SETS
            copied.__dict__[name] = (
                set(item) if fields else snapshot_batch(item)
            )
        return copied
    if type(value) is dict:
        return {key: snapshot_batch(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(snapshot_batch, value))
    return value


def pack_batch(value: Any) -> Any:
    """Turn a batch into tensors on the CPU and plain Python objects.

    Args:
        value (Any): Batch from a data loader.

    Returns:
        Any: For :func:`unpack_batch`. Objects that are neither tensors,
        arrays, mmengine's data elements nor plain are left out, by name.
    """
    if isinstance(value, Tensor):
        # a clone, because a view would bring all of its storage
        return value.detach().cpu().clone()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return _pack_array(value)
    if isinstance(value, BaseDataElement):
        fields = {
            name: sorted(item) if name in _FIELD_SETS else pack_batch(item)
            for name, item in vars(value).items()
        }
        return {_ELEMENT: _class_name(type(value)), 'fields': fields}
    if isinstance(value, dict):
        return {key: pack_batch(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        kind = tuple if isinstance(value, tuple) else list
        return kind(map(pack_batch, value))
    if isinstance(value, _PLAIN):
        return value
    return {_MISSING: _class_name(type(value))}


def _pack_array(value: np.ndarray) -> Any:
    """Turn an array into a tensor, one of text or objects into lists."""
    if value.dtype.kind in 'biufc':
        return {'__array__': torch.from_numpy(np.array(value, order='C'))}
    return pack_batch(value.tolist())


def unpack_batch(value: Any) -> Any:
    """Undo :func:`pack_batch`.

    Args:
        value (Any): What it has returned.

    Returns:
        Any: The batch.

    Raises:
        ValueError: If a data element's class is not imported.
    """
    if isinstance(value, dict):
        if _ELEMENT in value:
            return _unpack_element(value)
        if '__array__' in value:
            return value['__array__'].numpy()
        return {key: unpack_batch(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(unpack_batch, value))
    return value


def _unpack_element(packed: dict[str, Any]) -> BaseDataElement:
    """Rebuild a data element; nothing is imported for it."""
    known = {_class_name(cls): cls for cls in _subclasses(BaseDataElement)}
    name = packed[_ELEMENT]
    if name not in known:
        raise ValueError(
            f'the batch holds objects of {name!r}, a class that is not '
            'imported: build the model (or import its package) first'
        )
    element: BaseDataElement = object.__new__(known[name])
    for key, item in packed['fields'].items():
        fields = key in _FIELD_SETS
        element.__dict__[key] = set(item) if fields else unpack_batch(item)
    return element


def _subclasses(cls: type) -> Iterator[type]:
    """Walk a class and everything below it."""
    yield cls
    child: type
    for child in cls.__subclasses__():
        yield from _subclasses(child)


def _class_name(cls: type) -> str:
    """Full name of a class."""
    return f'{cls.__module__}.{cls.__qualname__}'


@contextmanager
def drawing_from(state: dict[str, Any]) -> Iterator[None]:
    """Draw random numbers from a state; afterwards go on as before.

    Args:
        state (dict): Of ``get_random_state``.
    """
    before = get_random_state()
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(before)


def save_record(
    path: str | os.PathLike,
    model: nn.Module,
    batch: Any,
    random_state: dict[str, Any],
    **about: Any,
) -> None:
    """Write what is needed to run a training step again.

    Args:
        path (str | os.PathLike): File to write.
        model (nn.Module): Not wrapped; its weights are stored.
        batch (Any): As from the data loader.
        random_state (dict): Of ``get_random_state``, at the step's start.
        **about (Any): Plain values: ``iter``, ``autocast`` (the dtype's name
            or None), ``scale`` of the loss and others.
    """
    weights = {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
    record = dict(
        about,
        batch=pack_batch(batch),
        random_state=random_state,
        state_dict=weights,
    )
    torch.save(record, path)


def replay(
    record: str | os.PathLike,
    model: nn.Module | str | os.PathLike,
    device: str = 'cpu',
) -> Finding:
    """Run the step of a record again and find the first non-finite number.

    Nothing in the record is executed. What hooks add to a model during
    training is not there.

    Args:
        record (str | os.PathLike): File that ``DivergenceHook`` has written.
        model (nn.Module | str | os.PathLike): The model, or the config that
            builds it; it gets the record's weights.
        device (str): Where to run. Defaults to ``'cpu'``.

    Returns:
        Finding: As in the report.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no record of a step.
    """
    saved = load_checkpoint_tensors(record)
    missing = {'batch', 'random_state', 'state_dict'} - saved.keys()
    if missing:
        raise ValueError(
            f'{os.fspath(record)}: wanted a record of DivergenceHook, got a '
            f'file without {sorted(missing)}'
        )
    if not isinstance(model, nn.Module):
        model = build_model(Config.fromfile(model))
    model.load_state_dict(saved['state_dict'])
    model.to(device).train()
    context: Callable[[], AbstractContextManager] = nullcontext
    if saved.get('autocast'):
        dtype = getattr(torch, saved['autocast'])
        context = partial(torch.autocast, torch.device(device).type, dtype)
    batch = unpack_batch(saved['batch'])
    with drawing_from(saved['random_state']):
        return trace_step(model, batch, context, saved.get('scale', 1.0))
