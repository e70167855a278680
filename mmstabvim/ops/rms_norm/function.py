"""The normalization as a PyTorch operator, ``mmstabvim::add_rms_norm``.

It normalizes a stream, and adds to it before where there is a residual.
"""

from typing import Any

import torch
from torch import Tensor

from mmstabvim.ops import flops
from mmstabvim.ops.backend import Backends, no_derivative, not_narrow
from mmstabvim.ops.operator import register

MAX_DIM = 8192
"""Channels that a program can hold: a token is read once."""


def _triton_check(
    x: Tensor, residual: Tensor | None, weight: Tensor, out_dtype: torch.dtype
) -> Exception | None:
    devices = {v.device for v in (x, residual, weight) if v is not None}
    if len(devices) > 1 or x.numel() == 0 or x.shape[-1] > MAX_DIM:
        return ValueError(
            'the triton backend of the norm needs elements on one device, at '
            f'most {MAX_DIM} a token, got {tuple(x.shape)} on {devices}'
        )
    return not_narrow('triton', x, residual, weight, out_dtype)


BACKENDS = Backends('rms_norm', {'triton': _triton_check})
ADD_BACKENDS = Backends('add_rms_norm', {'triton': _triton_check})

add_rms_norm_op = register(
    __package__,
    'add_rms_norm',
    'Tensor x, Tensor? residual, Tensor weight, float eps, '
    'ScalarType out_dtype',
    '(Tensor, Tensor)',
    lambda kernels, *args: kernels.forward(*args),
)
"""Normalized tokens in ``out_dtype``, and the stream in float32.

The stream is empty, of shape (0,), without a residual: ``x`` is it.
"""

_backward = register(
    __package__,
    'add_rms_norm_backward',
    'Tensor dnormed, Tensor? dstream, Tensor stream, Tensor weight, '
    'float eps, ScalarType x_dtype, bool split',
    '(Tensor, Tensor, Tensor)',
    lambda kernels, *args: kernels.backward(*args),
)


@add_rms_norm_op.register_fake
def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (0,) if residual is None else x.shape
    stream = x.new_empty(shape, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), stream


@_backward.register_fake
def _backward_fake(
    dnormed: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    split: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = stream.shape if split else (0,)
    return (
        stream.new_empty(stream.shape, dtype=x_dtype),
        stream.new_empty(shape, dtype=torch.float32),
        weight.new_empty(weight.shape),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    x, residual, weight, ctx.eps, _, ctx.backend = inputs
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
        options = (ctx.eps, ctx.x_dtype, False, ctx.backend)
        dx, _, dweight = _backward(dnormed, None, stream, weight, *options)
        return dx, None, dweight, None, None, None
    # one gradient in two dtypes: written twice, or once if they are equal
    split = ctx.x_dtype != torch.float32
    dx, dresidual, dweight = _backward(
        dnormed,
        dstream,
        stream,
        weight,
        ctx.eps,
        ctx.x_dtype,
        split,
        ctx.backend,
    )
    if not split:
        dresidual = dx
    return dx, dresidual.to(ctx.residual_dtype), dweight, None, None, None


add_rms_norm_op.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(no_derivative('add_rms_norm'))
flops.count_flops('add_rms_norm', flops.none)
