"""Stand-in for the compiled part of mmcv."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn

from mmstabvim import stack


def stub_mmcv_ext() -> None:
    """Let ``mmcv.ops`` be imported where mmcv has no compiled part.

    ``mmseg.models`` imports it. Needed with mmcv-lite 2.1.0 and mmseg 1.2.2;
    ends when mmseg imports without ``mmcv.ops``. Full mmcv is not touched.
    """
    mmcv = importlib.util.find_spec('mmcv')
    if 'mmcv._ext' in sys.modules or mmcv is None:
        return
    folders = mmcv.submodule_search_locations
    if PathFinder.find_spec('mmcv._ext', folders) is None:
        sys.modules['mmcv._ext'] = _make_stub()


def _make_stub() -> ModuleType:
    """Make a module in which every name is a function that raises."""
    stub = ModuleType('mmcv._ext', 'Stands for the compiled part of mmcv.')
    # Without a loader mmcv's own check says that there are no ops.
    stub.__spec__ = ModuleSpec('mmcv._ext', None)
    stub.__getattr__ = _missing_op  # type: ignore[method-assign]
    # No ops, but asked for when mmcv lists its environment.
    for name in ('get_compiler_version', 'get_compiling_cuda_version'):
        setattr(stub, name, lambda: 'n/a')
    return stub


def _missing_op(name: str) -> Callable:
    """Return a function that raises for the op ``name``."""
    if name.startswith('__'):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def missing_op(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f'the mmcv op {name!r} is compiled, and the mmcv that is '
            f'installed has no compiled part. Cure: {stack.ops_command()}'
        )

    return missing_op
