"""Where the small operators around the scan run, and how they get there."""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from mmstabvim.log import print_log

ENVIRONMENT_VARIABLE = 'MMSTABVIM_BACKEND'


def use_triton(device: torch.device) -> bool:
    """Whether a Triton kernel computes what has plain PyTorch as well.

    It does on a GPU, unless triton is missing (said once) or the environment
    variable MMSTABVIM_BACKEND forces ``reference`` or ``cpu``.

    Args:
        device (torch.device): Where the tensors are.

    Returns:
        bool: False for every device but a GPU.
    """
    return device.type == 'cuda' and _allowed()


# torch.compile must not look inside: it cannot trace a search for modules
@torch.compiler.assume_constant_result
def _allowed() -> bool:
    forced = os.environ.get(ENVIRONMENT_VARIABLE) in ('reference', 'cpu')
    if forced:
        return False
    if not has_triton():
        _warn_without_triton()
        return False
    return True


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; it is imported where it is used."""
    return importlib.util.find_spec('triton') is not None


@functools.cache
def _warn_without_triton() -> None:
    print_log(
        'triton is not installed: convolution, gate and norm are plain '
        'PyTorch operations on the GPU',
        level=logging.WARNING,
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a CPU or a GPU, None where it is off."""
    kind = device.type
    if kind not in ('cpu', 'cuda') or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def deferred(module: str, name: str) -> Callable[..., Any]:
    """A function whose module is imported at the first call.

    Triton is slow to import, and not everywhere.

    Args:
        module (str): Absolute name of the module.
        name (str): Name of the function in it.

    Returns:
        Callable: Calls that function.
    """

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return call


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any
) -> None:
    """Run a Triton kernel on the GPU that holds its first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)
