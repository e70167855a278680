"""Depthwise causal convolution over tokens, in either direction."""

import torch
from torch import Tensor

from mmstabvim.ops.causal_conv1d import fused
from mmstabvim.ops.causal_conv1d.function import causal_conv1d_op
from mmstabvim.ops.causal_conv1d.reference import causal_conv1d_ref

__all__ = ['ACTIVATIONS', 'causal_conv1d', 'causal_conv1d_ref']

ACTIVATIONS = (None, 'silu')


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reverse: bool = False,
    activation: str | None = None,
) -> Tensor:
    """Depthwise convolution in which a token sees itself and the past only.

    ``out[t] = bias + sum_k weight[:, width - 1 - k] * x[t - k]`` with zeros
    before the first token. With ``reverse`` the past of a token are the
    tokens after it: the result equals flipping ``x`` and flipping back.

    On a CPU a fused kernel computes convolution and activation in float32
    and rounds once, provided that there is a C++ compiler, that the inputs
    share one dtype of at most 32 bits, and that ``width`` is at most 8.
    Otherwise it is PyTorch's convolution.

    Args:
        x (Tensor): (batch, length, dim).
        weight (Tensor): (dim, width); the last column weighs the token itself.
        bias (Tensor, optional): (dim,).
        reverse (bool): Walk from the last token to the first. Defaults to
            False.
        activation (str, optional): ``'silu'``, applied to the result.
            Defaults to None.

    Returns:
        Tensor: (batch, length, dim), dtype of ``x``, or of autocast.

    Raises:
        ValueError: If the shapes do not fit or the activation is unknown.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            'x must be (batch, length, dim) and weight (dim, width), got '
            f'{tuple(x.shape)} and {tuple(weight.shape)}'
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f'activation must be one of {ACTIVATIONS}, got {activation!r}'
        )
    if x.device.type == 'cpu' and torch.is_autocast_enabled('cpu'):
        x, weight = _autocast(x), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
    fits = fused.supports(x, weight, bias)
    conv = causal_conv1d_op if fits else causal_conv1d_ref
    return conv(x, weight, bias, reverse, activation)


def _autocast(x: Tensor) -> Tensor:
    """What autocast does to an input of a convolution: not to float64."""
    if x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype('cpu'))
