"""Registration of operators with PyTorch, and the choice of their kernels.

An operator ``mmstabvim::<name>`` is opaque to ``torch.compile`` (no graph
break) and has shapes without data. Its last argument names the backend.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef

ON_CPU = {'cpu': 'cpu', 'fused': 'fused', 'triton': 'triton'}
"""Backend, and the module of the operator's package that runs it."""

ON_GPU = {'cpu': 'cpu', 'fused': 'triton', 'triton': 'triton'}
"""The same for a GPU, where a graph that was recorded on a CPU may run."""


def kernels(package: str, backend: str) -> Any:
    """Import the module of a backend; Triton is slow to import."""
    return importlib.import_module(f'{package}.{backend}')


def register(
    package: str,
    name: str,
    arguments: str,
    results: str,
    call: Callable[..., Any],
) -> CustomOpDef:
    """Register an operator, with a kernel for each device.

    Args:
        package (str): Package that has a module for each backend.
        name (str): Name of the operator in the namespace ``mmstabvim``.
        arguments (str): Their schema, without the last one, ``str backend``.
        results (str): Their schema.
        call (Callable): Gets a backend's module and the arguments, and
            returns the results.

    Returns:
        CustomOpDef: The operator, still without fake tensors and gradients.
    """

    def on(modules: dict[str, str]) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            *given, backend = args
            return call(kernels(package, modules[backend]), *given)

        return kernel

    operator = torch.library.custom_op(
        f'mmstabvim::{name}',
        on(ON_CPU),
        mutates_args=(),
        schema=f'({arguments}, str backend) -> {results}',
    )
    operator.register_kernel('cuda')(on(ON_GPU))
    return operator
