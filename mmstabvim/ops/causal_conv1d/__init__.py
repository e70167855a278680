"""Depthwise causal convolution over tokens, in either direction."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmstabvim.ops.backend import autocast_dtype
from mmstabvim.ops.causal_conv1d.function import BACKENDS, causal_conv1d_op
from mmstabvim.ops.causal_conv1d.reference import (
    causal_conv1d_directions_ref,
    causal_conv1d_ref,
)

__all__ = [
    'ACTIVATIONS',
    'BACKENDS',
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
    backend: str = 'auto',
) -> Tensor:
    """Depthwise convolution in which a token sees itself and the past only.

    ``out[t] = bias + sum_k weight[:, width - 1 - k] * x[t - k]`` with zeros
    before the first token. With ``reverse`` the past of a token are the
    tokens after it: the result equals flipping ``x`` and flipping back.

    The kernels compute convolution and activation in float32 and round once.

    Args:
        x (Tensor): (batch, length, dim).
        weight (Tensor): (dim, width); the last column weighs the token itself.
        bias (Tensor, optional): (dim,).
        reverse (bool): Walk from the last token to the first. Defaults to
            False.
        activation (str, optional): ``'silu'``, applied to the result.
            Defaults to None.
        backend (str): ``'auto'``, ``'reference'`` (PyTorch), ``'fused'``
            (C++, on a CPU with a compiler) or ``'triton'``; the latter two
            take inputs of one dtype of at most 32 bits and a width of at
            most 8. ``'auto'`` obeys the environment variable
            MMSTABVIM_BACKEND, else is the fastest that fits the inputs on
            their device. Defaults to ``'auto'``.

    Returns:
        Tensor: (batch, length, dim), dtype of ``x``, or of autocast.

    Raises:
        RuntimeError: If the backend cannot run here.
        TypeError: If a dtype does not fit the backend.
        ValueError: If the shapes do not fit or a name is unknown.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0])[None, :, None]
        >>> causal_conv1d(x, torch.tensor([[1.0, 10.0]])).flatten()
        tensor([10., 21., 32.])
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            'x must be (batch, length, dim) and weight (dim, width), got '
            f'{tuple(x.shape)} and {tuple(weight.shape)}'
        )
    if bias is not None:
        _check_bias(bias, weight)
        bias = bias.unsqueeze(0)
    y = _convolve(
        x, weight.unsqueeze(0), bias, (reverse,), activation, backend
    )
    return y.squeeze(0)


def causal_conv1d_directions(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reverse: Sequence[bool] = (False, True),
    activation: str | None = None,
    backend: str = 'auto',
) -> Tensor:
    """Run several :func:`causal_conv1d` side by side, in one call.

    The kernels of a GPU read a shared ``x`` once for all directions and sum
    its gradient over them.

    Args:
        x (Tensor): (batch, length, dim), shared by all directions, or
            (directions, batch, length, dim).
        weight (Tensor): (directions, dim, width), as in
            :func:`causal_conv1d`.
        bias (Tensor, optional): (directions, dim).
        reverse (Sequence[bool]): Of each direction, whether it walks from
            the last token to the first. Defaults to (False, True).
        activation (str, optional): ``'silu'``, applied to the result.
            Defaults to None.
        backend (str): As in :func:`causal_conv1d`. Defaults to ``'auto'``.

    Returns:
        Tensor: (directions, batch, length, dim), dtype of ``x``, or of
        autocast.

    Raises:
        RuntimeError: If the backend cannot run here.
        TypeError: If a dtype does not fit the backend.
        ValueError: If the shapes do not fit or a name is unknown.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0])[None, :, None]
        >>> taps = torch.tensor([[1.0, 10.0]])
        >>> causal_conv1d_directions(x, torch.stack([taps, taps])).squeeze()
        tensor([[10., 21., 32.],
                [12., 23., 30.]])
    """
    shared = x.dim() == 3
    if (
        not (shared or x.shape[:-3] == weight.shape[:1])
        or weight.dim() != 3
        or weight.shape[1] != x.shape[-1]
    ):
        raise ValueError(
            'x must be (batch, length, dim) or (directions, batch, length, '
            'dim) and weight (directions, dim, width), got '
            f'{tuple(x.shape)} and {tuple(weight.shape)}'
        )
    if not len(reverse) == weight.shape[0] > 0:
        raise ValueError(
            'reverse must have one entry for each direction of weight '
            f'{tuple(weight.shape)}, got {len(reverse)}'
        )
    if bias is not None:
        _check_bias(bias, weight)
    return _convolve(x, weight, bias, tuple(reverse), activation, backend)


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
    backend: str,
) -> Tensor:
    """All directions, each with its weight."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f'activation must be one of {ACTIVATIONS}, got {activation!r}'
        )
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    chosen = BACKENDS.choose(backend, x, weight, bias)
    if chosen == 'reference':
        return causal_conv1d_directions_ref(
            x, weight, bias, reverse, activation
        )
    order = [int(flag) for flag in reverse]
    y: Tensor = causal_conv1d_op(x, weight, bias, order, activation, chosen)
    return y


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert an input as autocast would: not float64."""
    return x if x.dtype == torch.float64 else x.to(dtype)
