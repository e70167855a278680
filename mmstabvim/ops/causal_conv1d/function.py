"""The convolution as a PyTorch operator, ``mmstabvim::causal_conv1d``.

It is counted as PyTorch's own convolution is.
"""

from typing import Any

from torch import Tensor

from mmstabvim.ops.backend import Backends, no_derivative, not_narrow
from mmstabvim.ops.causal_conv1d import fused
from mmstabvim.ops.flops import count_flops
from mmstabvim.ops.operator import register

# no list of bool: mmengine's complexity analysis traces, and cannot trace one
_INPUTS = (
    'Tensor x, Tensor weight, Tensor? bias, int[] reverse, str? activation'
)


def _check(
    backend: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Exception | None:
    """Refuse what a kernel would compute otherwise than PyTorch."""
    given = [x, weight] if bias is None else [x, weight, bias]
    if any(v.device != x.device for v in given) or 0 in x.shape:
        return ValueError(
            f'the {backend} backend of causal_conv1d needs elements on one '
            f'device, got {tuple(x.shape)} on {[str(v.device) for v in given]}'
        )
    if not 1 <= weight.shape[-1] <= fused.MAX_WIDTH:
        return ValueError(
            f'the {backend} backend of causal_conv1d takes a width of at most '
            f'{fused.MAX_WIDTH}, got {weight.shape[-1]}'
        )
    if any(v.dtype != x.dtype for v in given) or x.is_complex():
        return TypeError(
            f'the {backend} backend of causal_conv1d takes one real dtype, '
            f'got {[v.dtype for v in given]}'
        )
    return not_narrow(backend, *given)


def _fused_check(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> Exception | None:
    return _check('fused', x, weight, bias) or fused.refusal()


def _triton_check(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> Exception | None:
    return _check('triton', x, weight, bias)


BACKENDS = Backends(
    'causal_conv1d', {'fused': _fused_check, 'triton': _triton_check}
)
"""Also of ``causal_conv1d_directions``."""

causal_conv1d_op = register(
    __package__,
    'causal_conv1d',
    _INPUTS,
    'Tensor',
    lambda kernels, *args: kernels.forward(*args),
)
_backward = register(
    __package__,
    'causal_conv1d_backward',
    f'Tensor dy, {_INPUTS}',
    '(Tensor, Tensor, Tensor)',
    lambda kernels, *args: kernels.backward(*args),
)


@causal_conv1d_op.register_fake
def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    return x.new_empty((weight.shape[0], *x.shape[-3:]))


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(weight.shape[:2])
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy, x, weight, bias, *ctx.options)
    dbias = None if bias is None else dbias
    return dx, dweight, dbias, None, None, None


causal_conv1d_op.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(no_derivative('causal_conv1d'))


def conv_flops(x: Tensor, weight: Tensor, *others: Any) -> int:
    """Count the floating-point operations of one forward pass.

    As PyTorch counts a convolution: neither bias nor activation.

    Args:
        x (Tensor): (batch, length, dim), perhaps after (directions,).
        weight (Tensor): (directions, dim, width).
        *others (Any): The operator's other inputs.

    Returns:
        int: Operations; one multiply-add counts as two.
    """
    return 2 * x.shape[-3] * x.shape[-2] * weight.numel()


def _backward_flops(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: list[int],
    activation: str | None,
    backend: str,
) -> int:
    """Two convolutions, and the forward pass again for the activation."""
    return (2 if activation is None else 3) * conv_flops(x, weight)


count_flops('causal_conv1d', conv_flops, _backward_flops, 'conv')
