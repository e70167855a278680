"""Root-mean-square normalization, with or without a residual stream."""

import torch
from torch import Tensor

from mmstabvim.ops.rms_norm.function import rms_norm_op, supports_triton
from mmstabvim.ops.rms_norm.reference import (
    add_residual,
    add_rms_norm_ref,
    rms_norm_ref,
)

__all__ = [
    'add_residual',
    'add_rms_norm',
    'add_rms_norm_ref',
    'rms_norm',
    'rms_norm_ref',
]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Divide each token by its root mean square, then scale each channel.

    Computed in float32 or wider, whatever autocast says; the result has the
    dtype of ``x``.

    Args:
        x (Tensor): (..., dim), any floating dtype.
        weight (Tensor): (dim,), scale of each channel.
        eps (float): Added to the mean square. Defaults to 1e-5.

    Returns:
        Tensor: The shape and dtype of ``x``.

    Raises:
        ValueError: If ``weight`` is not (dim,).

    Source: arXiv:1910.07467, Eq. 4.
    """
    _check_weight(x, weight)
    if supports_triton(x, None, weight, x.dtype):
        return rms_norm_op(x, None, weight, eps, x.dtype)[0]
    return rms_norm_ref(x, weight, eps)


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, then normalize it.

    The stream is kept in float32 or wider and normalized as by
    :func:`rms_norm`, whatever autocast says. On a GPU one Triton kernel does
    both, for at most 32 bits and 8192 channels.

    Args:
        hidden (Tensor): (..., dim), what to add, any floating dtype.
        residual (Tensor, optional): The stream so far, as ``hidden``; None is
            a stream of zeros.
        weight (Tensor): (dim,), scale of each channel.
        eps (float): Added to the mean square. Defaults to 1e-5.
        out_dtype (torch.dtype, optional): Of the normalized stream, rounded
            to once. Defaults to that of ``weight``.

    Returns:
        tuple[Tensor, Tensor]: The normalized stream and the stream, both of
        the shape of ``hidden``.

    Raises:
        ValueError: If ``weight`` is not (dim,) or ``residual`` has not the
            shape of ``hidden``.

    Source: arXiv:1910.07467, Eq. 4.
    """
    _check_weight(hidden, weight)
    if residual is not None and residual.shape != hidden.shape:
        raise ValueError(
            f'residual must have the shape of hidden {tuple(hidden.shape)}, '
            f'got {tuple(residual.shape)}'
        )
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    if not supports_triton(hidden, residual, weight, out_dtype):
        return add_rms_norm_ref(hidden, residual, weight, eps, out_dtype)
    if residual is None:
        stream = add_residual(hidden, None)
        return rms_norm_op(stream, None, weight, eps, out_dtype)[0], stream
    return rms_norm_op(hidden, residual, weight, eps, out_dtype)


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f'weight must be ({x.shape[-1]},) for x {tuple(x.shape)}, '
            f'got {tuple(weight.shape)}'
        )
