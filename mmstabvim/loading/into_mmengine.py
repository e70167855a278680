"""Loading of weights in mmengine, done by this package."""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from mmstabvim.loading.file import name_source, select
from mmstabvim.loading.weights import load_into

_last_said: ContextVar[str] = ContextVar('last_said', default='')


def install() -> None:
    """Put :func:`load_weights` into mmengine; more than once does no harm."""
    loader = mmengine_checkpoint.CheckpointLoader
    if hasattr(loader.load_checkpoint, '__wrapped__'):
        return
    read = loader.load_checkpoint

    @wraps(read)
    def load_checkpoint(filename: str, *args: Any, **kwargs: Any) -> Any:
        return name_source(read(filename, *args, **kwargs), filename)

    loader.load_checkpoint = staticmethod(load_checkpoint)
    mmengine_checkpoint.load_state_dict = _load_state_dict
    mmengine_checkpoint._load_checkpoint_with_prefix = _load_with_prefix


def _load_state_dict(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    strict: bool = False,
    logger: Any = None,
) -> None:
    """Stand for mmengine's function of that name."""
    report = load_into(module, state_dict, strict)
    if str(report) == _last_said.get():
        return  # the EMA hook loads the same once more
    _last_said.set(str(report))
    level = logging.INFO if report.complete else logging.WARNING
    print_log(str(report), logger=logger or 'current', level=level)


def _load_with_prefix(
    prefix: str, filename: str, map_location: Any = None
) -> OrderedDict:
    """Stand for mmengine's function of that name."""
    checkpoint = mmengine_checkpoint._load_checkpoint(filename, map_location)
    return select(checkpoint, prefix)
