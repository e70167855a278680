"""The gated merge on a GPU as a PyTorch operator.

``mmstabvim::gated_merge`` is opaque to ``torch.compile`` (no graph break) and
has shapes without data. It counts as no floating-point operations, as
elementwise operations do in PyTorch's and MMEngine's counters.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmstabvim.ops.backend import deferred, use_triton
from mmstabvim.ops.flops import teach_mmengine

_MODULE = 'mmstabvim.ops.gated_merge.triton'
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_merge = torch.library.custom_op(
    'mmstabvim::gated_merge',
    deferred(_MODULE, 'forward'),
    mutates_args=(),
    schema='(Tensor y, Tensor z) -> Tensor',
)
_merge_backward = torch.library.custom_op(
    'mmstabvim::gated_merge_backward',
    deferred(_MODULE, 'backward'),
    mutates_args=(),
    schema='(Tensor dout, Tensor y, Tensor z) -> (Tensor, Tensor)',
)


@_merge.register_fake
def _merge_fake(y: Tensor, z: Tensor) -> Tensor:
    return y.new_empty(z.shape)


@_merge_backward.register_fake
def _merge_backward_fake(
    dout: Tensor, y: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    return y.new_empty(z.shape), z.new_empty(z.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    y, z = ctx.saved_tensors
    dy, dz = _merge_backward(dout, y, z)
    return dy.expand(y.shape), dz  # each direction has the same gradient


_merge.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(
    [
        torch.ops.mmstabvim.gated_merge,
        torch.ops.mmstabvim.gated_merge_backward,
    ]
)
def _formula(*args: Any, **kwargs: Any) -> int:
    return 0


teach_mmengine('mmstabvim::gated_merge', _formula)


def supports_triton(y: Tensor, z: Tensor) -> bool:
    """Whether the inputs are on a GPU, and a kernel there can run them."""
    return (
        use_triton(y.device)
        and z.device == y.device
        and y.dtype in _DTYPES
        and z.dtype in _DTYPES
        and z.numel() > 0
    )


def gated_merge_op(y: Tensor, z: Tensor) -> Tensor:
    """The operator, with the signature of ``gated_merge_ref``."""
    return _merge(y, z)
