"""Depthwise causal convolution over tokens, in either direction."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmstabvim.ops.backend import autocast_dtype
from mmstabvim.ops.causal_conv1d import fused
from mmstabvim.ops.causal_conv1d.function import (
    causal_conv1d_op,
    supports_triton,
)
from mmstabvim.ops.causal_conv1d.reference import (
    causal_conv1d_directions_ref,
    causal_conv1d_ref,
)

__all__ = [
    'ACTIVATIONS',
    'causal_conv1d',
    'causal_conv1d_directions',
    'causal_conv1d_directions_ref',
    'causal_conv1d_ref',
]

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
    share one dtype of at most 32 bits, and that ``width`` is at most 8. On a
    GPU a Triton kernel does, on the same conditions on the inputs.
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
    if bias is not None:
        _check_bias(bias, weight)
        bias = bias.unsqueeze(0)
    y = _convolve(x, weight.unsqueeze(0), bias, (reverse,), activation)
    return y.squeeze(0)


def causal_conv1d_directions(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reverse: Sequence[bool] = (False, True),
    activation: str | None = None,
) -> Tensor:
    """Several :func:`causal_conv1d` over the same tokens, in one call.

    The kernels of a GPU read ``x`` once for all directions and sum its
    gradient over them.

    Args:
        x (Tensor): (batch, length, dim), seen by every direction.
        weight (Tensor): (directions, dim, width), as in
            :func:`causal_conv1d`.
        bias (Tensor, optional): (directions, dim).
        reverse (Sequence[bool]): Of each direction, whether it walks from
            the last token to the first. Defaults to (False, True).
        activation (str, optional): ``'silu'``, applied to the result.
            Defaults to None.

    Returns:
        Tensor: (directions, batch, length, dim), dtype of ``x``, or of
        autocast.

    Raises:
        ValueError: If the shapes do not fit or the activation is unknown.
    """
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            'x must be (batch, length, dim) and weight (directions, dim, '
            f'width), got {tuple(x.shape)} and {tuple(weight.shape)}'
        )
    if not len(reverse) == weight.shape[0] > 0:
        raise ValueError(
            'reverse must have one entry for each direction of weight '
            f'{tuple(weight.shape)}, got {len(reverse)}'
        )
    if bias is not None:
        _check_bias(bias, weight)
    return _convolve(x, weight, bias, tuple(reverse), activation)


def _check_bias(bias: Tensor, weight: Tensor) -> None:
    if bias.shape != weight.shape[:-1]:
        raise ValueError(
            f'bias must be {tuple(weight.shape[:-1])} for weight '
            f'{tuple(weight.shape)}, got {tuple(bias.shape)}'
        )


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: tuple[bool, ...],
    activation: str | None,
) -> Tensor:
    """All directions, by whatever fits the inputs."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f'activation must be one of {ACTIVATIONS}, got {activation!r}'
        )
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    inputs = (x, weight, bias)
    fits = supports_triton(*inputs) or fused.supports(*inputs)
    conv = causal_conv1d_op if fits else causal_conv1d_directions_ref
    return conv(x, weight, bias, reverse, activation)


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an input of a convolution: not to float64."""
    return x if x.dtype == torch.float64 else x.to(dtype)
