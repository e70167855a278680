"""Errors of mmengine that say more: near names, and folders of the data."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIMIZERS

from mmstabvim.engine.mistakes import Mistake, SettingError, UnknownTypeError
from mmstabvim.registry import suggest_types


@contextmanager
def explain_errors() -> Iterator[None]:
    """Say more about a misspelt ``type`` and about unreadable data.

    Raises:
        KeyError: With near names, if a ``type`` is in no registry.
        ValueError: With the folders searched, if a dataset failed to load.
    """
    with ExitStack() as stack:
        for cls, method, explain in (
            (BaseDataset, 'full_init', _explain_data),
            (DefaultOptimWrapperConstructor, '__call__', _explain_optimizer),
        ):
            original = getattr(cls, method)
            setattr(cls, method, _explained(original, explain))
            stack.callback(setattr, cls, method, original)
        try:
            yield
        except Mistake:
            raise
        except KeyError as error:
            hint = suggest_types(error)
            if hint is None:
                raise
            raise UnknownTypeError(f'{error.args[0]} {hint}') from error


def _explained(
    method: Callable, explain: Callable[[Any, Exception], Mistake | None]
) -> Callable:
    """Wrap a method; its errors are replaced where there is more to say."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Mistake:
            raise
        except Exception as error:
            better = explain(self, error)
            if better is None:
                raise
            raise better from error

    return wrapped


def _explain_optimizer(constructor: Any, error: Exception) -> Mistake | None:
    """Name an unknown optimizer: mmengine fails on the class it is not."""
    kind = constructor.optimizer_cfg.get('type')
    found = None
    with (
        suppress(Exception),
        OPTIMIZERS.switch_scope_and_registry(None) as registry,
    ):
        found = registry.get(kind)
    if found is not None or not isinstance(kind, str):
        return None
    unknown = f'{kind} is not in the optimizer registry.'
    hint = suggest_types(KeyError(unknown)) or ''
    return UnknownTypeError(f'{unknown} {hint}')


def _explain_data(dataset: Any, error: Exception) -> Mistake | None:
    """Name the folders of a dataset that failed to load."""
    if isinstance(error, KeyError) and suggest_types(error):
        return None
    return SettingError(_describe_data(dataset, error))


def _describe_data(dataset: Any, error: Exception) -> str:
    """List the folders and files of a dataset and their content."""
    prefix = getattr(dataset, 'data_prefix', None) or {}
    places = {
        'data_root': getattr(dataset, 'data_root', None),
        'ann_file': getattr(dataset, 'ann_file', None),
        **(prefix if isinstance(prefix, dict) else {'data_prefix': prefix}),
    }
    lines = [
        f'{name}={str(path)!r} ({_describe_path(Path(path))})'
        for name, path in places.items()
        if path
    ]
    return (
        f'{type(dataset).__name__} found no data that it can use: '
        f'{", ".join(lines) or "no folder given"}. {error}'
    )


def _describe_path(path: Path) -> str:
    """Describe the content of a path."""
    if path.is_dir():
        count = sum(1 for _ in path.iterdir())
        return f'{count} entries' if count else 'an empty folder'
    return 'a file' if path.exists() else 'does not exist'
