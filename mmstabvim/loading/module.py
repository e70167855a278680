"""Weights of a module: list them past wrappers, and fill them."""

from collections.abc import Iterator
from typing import Any

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of distributed, TTA and compiling wrappers."""
    inner: Any = model
    while is_model_wrapper(inner) or isinstance(inner, BaseTTAModel):
        inner = inner.module
    return getattr(inner, '_orig_mod', inner)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect parameters and persistent buffers but BN's counters."""
    return {
        name: value
        for name, value in model_state(model)
        if 'num_batches_tracked' not in name and isinstance(value, Tensor)
    }


def model_state(
    model: nn.Module, prefix: str = ''
) -> Iterator[tuple[str, Any]]:
    """Walk a model's state past hooks that leave out part of it."""
    hidden = model._non_persistent_buffers_set
    for name, value in (*model._parameters.items(), *model._buffers.items()):
        if value is not None and name not in hidden:
            yield prefix + name, value
    for name, child in model._modules.items():
        if child is not None:
            yield from model_state(unwrap(child), f'{prefix}{name}.')


def fill(
    target: nn.Module, state: dict[str, Tensor], metadata: dict[str, Any]
) -> list[str]:
    """Copy the weights; modules may change ``state`` to their liking.

    Returns:
        list[str]: PyTorch's messages about weights of another shape.
    """
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []

    def load(module: nn.Module, local: dict[str, Tensor], prefix: str) -> None:
        module = unwrap(module)
        module._load_from_state_dict(
            local,
            prefix,
            metadata.get(prefix[:-1], {}),
            True,
            missing,
            unexpected,
            errors,
        )
        for name, child in module._modules.items():
            if child is not None:
                start = f'{prefix}{name}.'
                below = {k: v for k, v in local.items() if k.startswith(start)}
                given = set(below)
                load(child, below, start)
                for dropped in given - below.keys():
                    del local[dropped]
                local.update(below)
        keys = nn.modules.module._IncompatibleKeys(missing, unexpected)
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, keys)

    load(target, state, '')
    return errors
