"""Floating-point operations of the operators, for those who count them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmstabvim import stack


def count_flops(
    operator: str,
    formula: Callable[..., int],
    backward_formula: Callable[..., int] | None = None,
    activation: str | None = None,
) -> None:
    """Tell PyTorch's and MMEngine's counters what an operator computes.

    MMEngine offers no public way to do so, and is not imported for it. It
    counts forward passes only, in multiply-adds: half of the operations.

    Args:
        operator (str): Name of the operator in the namespace ``mmstabvim``.
        formula (Callable): Number of operations, from the operator's inputs:
            tensors perhaps without data.
        backward_formula (Callable, optional): The same of the operator
            ``<operator>_backward``. Defaults to ``formula``.
        activation (str, optional): Name under which MMEngine counts the size
            of the output as activations. Defaults to None: not counted.
    """
    passes = {'': formula, '_backward': backward_formula or formula}
    for ending, count in passes.items():
        packet = getattr(torch.ops.mmstabvim, f'{operator}{ending}')
        register_flop_formula(packet, get_raw=True)(_without_output(count))

    def teach(analysis: Any) -> None:
        name = f'mmstabvim::{operator}'
        analysis._DEFAULT_SUPPORTED_FLOP_OPS[name] = lambda inputs, _: (
            formula(*map(_without_data, inputs)) // 2
        )
        if activation is not None:
            analysis._DEFAULT_SUPPORTED_ACT_OPS[name] = (
                analysis.generic_activation_jit(activation)
            )

    stack.after_import('mmengine.analysis.complexity_analysis', teach)


def none(*inputs: Any) -> int:
    """Count nothing, as PyTorch does for elementwise operations and norms."""
    return 0


def _without_output(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *inputs, out_val=None, **_: formula(*inputs)


def _without_data(value: torch._C.Value) -> Tensor | None:
    """A tensor of a traced graph by its shape and dtype; None for others."""
    kind = value.type()
    if not isinstance(kind, torch._C.TensorType):
        return None
    sizes = kind.sizes() or ()
    return torch.empty(sizes, dtype=kind.dtype(), device='meta')
