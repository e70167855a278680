"""The fused convolution as a PyTorch operator, C++ or Triton by device.

``mmstabvim::causal_conv1d`` is opaque to ``torch.compile`` (no graph break),
has shapes without data, and is counted as PyTorch's own convolution is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmstabvim.ops.backend import deferred, use_triton
from mmstabvim.ops.causal_conv1d import fused
from mmstabvim.ops.flops import teach_mmengine

_TRITON = 'mmstabvim.ops.causal_conv1d.triton'
# no list of bool: mmengine's complexity analysis traces, and cannot trace one
_INPUTS = (
    'Tensor x, Tensor weight, Tensor? bias, int[] reverse, str? activation'
)

_conv = torch.library.custom_op(
    'mmstabvim::causal_conv1d',
    fused.forward,
    mutates_args=(),
    device_types='cpu',
    schema=f'({_INPUTS}) -> Tensor',
)
_conv_backward = torch.library.custom_op(
    'mmstabvim::causal_conv1d_backward',
    fused.backward,
    mutates_args=(),
    device_types='cpu',
    schema=f'(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor)',
)


_conv.register_kernel('cuda')(deferred(_TRITON, 'forward'))
_conv_backward.register_kernel('cuda')(deferred(_TRITON, 'backward'))


@_conv.register_fake
def _conv_fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty((weight.shape[0], *x.shape))


@_conv_backward.register_fake
def _conv_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(weight.shape[:2])
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _conv_backward(dy, x, weight, bias, *ctx.options)
    return dx, dweight, None if bias is None else dbias, None, None


_conv.register_autograd(_autograd, setup_context=_setup_context)


def conv_flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> int:
    """Floating-point operations of one forward pass.

    As PyTorch counts a convolution: neither bias nor activation.

    Args:
        x_shape (tuple[int, ...]): (batch, length, dim).
        weight_shape (tuple[int, ...]): (directions, dim, width).

    Returns:
        int: Operations; one multiply-add counts as two.
    """
    directions, dim, width = weight_shape
    return 2 * directions * x_shape[0] * x_shape[1] * dim * width


@register_flop_formula(torch.ops.mmstabvim.causal_conv1d)
def _forward_formula(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    *args: Any,
    **kwargs: Any,
) -> int:
    return conv_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.mmstabvim.causal_conv1d_backward)
def _backward_formula(
    dy_shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...] | None,
    reverse: Sequence[bool],
    activation: str | None,
    **kwargs: Any,
) -> int:
    """Two convolutions, and the forward pass again for the activation."""
    passes = 2 if activation is None else 3
    return passes * conv_flops(x_shape, weight_shape)


def _mmengine_formula(inputs: list[Any], outputs: list[Any]) -> int:
    """MMEngine's unit is the multiply-add: half of our operations."""
    x_shape, weight_shape = (value.type().sizes() for value in inputs[:2])
    return conv_flops(x_shape, weight_shape) // 2


teach_mmengine('mmstabvim::causal_conv1d', _mmengine_formula, 'conv')


def supports_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the inputs are on a GPU, and a kernel there can run them."""
    return use_triton(x.device) and fused.fits(x, weight, bias)


def causal_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: Sequence[bool],
    activation: str | None,
) -> Tensor:
    """The operator, with the signature of ``causal_conv1d_directions_ref``."""
    return _conv(x, weight, bias, [int(k) for k in reverse], activation)
