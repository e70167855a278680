"""The gated merge as a PyTorch operator, ``mmstabvim::gated_merge``."""

from typing import Any

from torch import Tensor

from mmstabvim.ops import flops
from mmstabvim.ops.backend import Backends, no_derivative, not_narrow
from mmstabvim.ops.operator import register

_INPUTS = 'Tensor y, Tensor z, int divisor'


def _triton_check(y: Tensor, z: Tensor) -> Exception | None:
    if z.device != y.device or z.numel() == 0:
        return ValueError(
            'the triton backend of gated_merge needs elements, on one device, '
            f'got {tuple(z.shape)} on {z.device} and y on {y.device}'
        )
    return not_narrow('triton', y, z)


BACKENDS = Backends('gated_merge', {'triton': _triton_check})

gated_merge_op = register(
    __package__,
    'gated_merge',
    _INPUTS,
    'Tensor',
    lambda kernels, *args: kernels.forward(*args),
)
_backward = register(
    __package__,
    'gated_merge_backward',
    f'Tensor dout, {_INPUTS}',
    '(Tensor, Tensor)',
    lambda kernels, *args: kernels.backward(*args),
)


@gated_merge_op.register_fake
def _fake(y: Tensor, z: Tensor, *options: Any) -> Tensor:
    return y.new_empty(z.shape)


@_backward.register_fake
def _backward_fake(
    dout: Tensor, y: Tensor, z: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return y.new_empty(z.shape), z.new_empty(z.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, z, *ctx.options = inputs
    ctx.save_for_backward(y, z)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    y, z = ctx.saved_tensors
    dy, dz = _backward(dout, y, z, *ctx.options)
    # each direction has the same gradient
    return dy.expand(y.shape), dz, None, None


gated_merge_op.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(no_derivative('gated_merge'))
flops.count_flops('gated_merge', flops.none)
