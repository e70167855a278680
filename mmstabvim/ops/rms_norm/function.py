"""Normalization, and the addition before it, on a GPU as a PyTorch operator.

``mmstabvim::add_rms_norm`` is opaque to ``torch.compile`` (no graph break)
and has shapes without data. It counts as no floating-point operations, as
PyTorch's own ``rms_norm`` does in its and in MMEngine's counters.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmstabvim.ops.backend import deferred, use_triton
from mmstabvim.ops.flops import teach_mmengine

MAX_DIM = 8192
"""Channels that a program can hold: a token is read once."""

_MODULE = 'mmstabvim.ops.rms_norm.triton'
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_norm = torch.library.custom_op(
    'mmstabvim::add_rms_norm',
    deferred(_MODULE, 'forward'),
    mutates_args=(),
    schema='(Tensor x, Tensor? residual, Tensor weight, float eps, '
    'ScalarType out_dtype) -> (Tensor, Tensor)',
)
_norm_backward = torch.library.custom_op(
    'mmstabvim::add_rms_norm_backward',
    deferred(_MODULE, 'backward'),
    mutates_args=(),
    schema='(Tensor dnormed, Tensor? dstream, Tensor stream, Tensor weight, '
    'float eps, ScalarType x_dtype, bool split) -> (Tensor, Tensor, Tensor)',
)


@_norm.register_fake
def _norm_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    shape = (0,) if residual is None else x.shape
    stream = x.new_empty(shape, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), stream


@_norm_backward.register_fake
def _norm_backward_fake(
    dnormed: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    split: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = stream.shape if split else (0,)
    return (
        stream.new_empty(stream.shape, dtype=x_dtype),
        stream.new_empty(shape, dtype=torch.float32),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, ctx.eps, _ = inputs
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else output[1], weight)
    ctx.set_materialize_grads(False)
    if residual is None:
        ctx.mark_non_differentiable(output[1])


def _autograd(
    ctx: Any, dnormed: Tensor | None, dstream: Tensor | None
) -> tuple[Tensor | None, ...]:
    stream, weight = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(stream)
    if ctx.residual_dtype is None:
        options = (ctx.eps, ctx.x_dtype, False)
        dx, _, dweight = _norm_backward(
            dnormed, None, stream, weight, *options
        )
        return dx, None, dweight, None, None
    # one gradient in two dtypes: written twice, or once if they are equal
    split = ctx.x_dtype != torch.float32
    dx, dresidual, dweight = _norm_backward(
        dnormed, dstream, stream, weight, ctx.eps, ctx.x_dtype, split
    )
    if not split:
        dresidual = dx
    return dx, dresidual.to(ctx.residual_dtype), dweight, None, None


_norm.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(
    [
        torch.ops.mmstabvim.add_rms_norm,
        torch.ops.mmstabvim.add_rms_norm_backward,
    ]
)
def _formula(*args: Any, **kwargs: Any) -> int:
    return 0


teach_mmengine('mmstabvim::add_rms_norm', _formula)


def supports_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, out_dtype: torch.dtype
) -> bool:
    """Whether the inputs are on a GPU, and a kernel there can run them."""
    given = (x, weight) if residual is None else (x, residual, weight)
    return (
        use_triton(x.device)
        and all(tensor.device == x.device for tensor in given)
        and all(tensor.dtype in _DTYPES for tensor in given)
        and out_dtype in _DTYPES
        and x.numel() > 0
        and x.shape[-1] <= MAX_DIM
    )


def rms_norm_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The operator: normalized in ``out_dtype``, and the stream in float32.

    The stream is empty, of shape (0,), without a residual: ``x`` is it.
    """
    return _norm(x, residual, weight, eps, out_dtype)
