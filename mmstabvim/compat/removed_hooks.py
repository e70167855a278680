"""None under ``default_hooks`` removes a hook of any name."""

import functools
from collections.abc import Callable
from typing import Any

from mmengine.runner import FlexibleRunner, Runner

DEFAULT_HOOKS = frozenset(
    {
        'runtime_info',
        'timer',
        'sampler_seed',
        'logger',
        'param_scheduler',
        'checkpoint',
    }
)
"""Names under ``default_hooks`` that mmengine fills in by itself."""


def remove_hooks_by_none() -> None:
    """Let None under ``default_hooks`` remove a hook of any name.

    mmengine takes None for its own six and fails with an empty assertion
    for others. Ends when it takes None for every name.
    """
    for runner in (Runner, FlexibleRunner):
        register = runner.register_default_hooks
        if not hasattr(register, '__wrapped__'):
            runner.register_default_hooks = _without_removed(register)


def _without_removed(register: Callable) -> Callable:
    """Wrap a runner's ``register_default_hooks``."""

    @functools.wraps(register)
    def wrapped(self: Any, hooks: Any = None) -> None:
        kept = {
            name: hook
            for name, hook in (hooks or {}).items()
            if hook is not None or name in DEFAULT_HOOKS
        }
        register(self, kept)

    return wrapped
