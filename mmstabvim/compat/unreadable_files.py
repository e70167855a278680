"""Errors of loading transforms name the file."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any


def name_unreadable_files(base: ModuleType) -> None:
    """Let an error of a loading transform name the file.

    OpenCV and Pillow do not, mmcv passes their errors on. Ends when mmcv's
    ``LoadImageFromFile`` and ``LoadAnnotations`` name the file themselves.

    Args:
        base (ModuleType): ``mmcv.transforms.base``.
    """
    call = base.BaseTransform.__call__
    if not hasattr(call, '__wrapped__'):
        base.BaseTransform.__call__ = _with_file_name(call)


def _with_file_name(call: Callable) -> Callable:
    """Wrap a transform's ``__call__``."""

    @functools.wraps(call)
    def wrapped(self: Any, results: Any) -> Any:
        try:
            return call(self, results)
        except Exception as error:
            name = type(self).__name__
            if not name.startswith('Load') or not isinstance(results, dict):
                raise
            masks = 'Annotation' in name and results.get('seg_map_path')
            path = masks or results.get('img_path')
            if not path or str(path) in str(error):
                raise
            raise ValueError(
                f'{path} cannot be read by {name}, it may be damaged or '
                f'incomplete ({type(error).__name__}: {error})'
            ) from error

    return wrapped
