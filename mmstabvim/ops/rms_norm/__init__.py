"""Root-mean-square normalization, with or without a residual stream."""

import torch
from torch import Tensor

from mmstabvim.ops.rms_norm.function import (
    ADD_BACKENDS,
    BACKENDS,
    add_rms_norm_op,
)
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


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, backend: str = 'auto'
) -> Tensor:
    """Divide each token by its root mean square, then scale each channel.

    Computed in float32 or wider, whatever autocast says; the result has the
    dtype of ``x``.

    Args:
        x (Tensor): (..., dim), any floating dtype.
        weight (Tensor): (dim,), scale of each channel.
        eps (float): Added to the mean square. Defaults to 1e-5.
        backend (str): ``'auto'``, ``'reference'`` (PyTorch) or ``'triton'``
            (at most 32 bits and 8192 channels). ``'auto'`` obeys the
            environment variable MMSTABVIM_BACKEND, else is ``'triton'`` on a
            GPU where it fits and ``'reference'`` elsewhere. Defaults to
            ``'auto'``.

    Returns:
        Tensor: The shape and dtype of ``x``.

    Raises:
        RuntimeError: If the backend cannot run here.
        TypeError: If a dtype does not fit the backend.
        ValueError: If ``weight`` is not (dim,), or the backend is unknown or
            does not take the shape.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), eps=0.0)
        tensor([0.8485, 1.1314])

    Source: arXiv:1910.07467, Eq. 4.
    """
    _check_weight(x, weight)
    chosen = BACKENDS.choose(backend, x, None, weight, x.dtype)
    if chosen == 'reference':
        return rms_norm_ref(x, weight, eps)
    normed: Tensor
    normed, _ = add_rms_norm_op(x, None, weight, eps, x.dtype, chosen)
    return normed


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str = 'auto',
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, then normalize it.

    The stream is kept in float32 or wider and normalized as by
    :func:`rms_norm`, whatever autocast says. One Triton kernel does both.

    Args:
        hidden (Tensor): (..., dim), what to add, any floating dtype.
        residual (Tensor, optional): The stream so far, as ``hidden``; None is
            a stream of zeros.
        weight (Tensor): (dim,), scale of each channel.
        eps (float): Added to the mean square. Defaults to 1e-5.
        out_dtype (torch.dtype, optional): Of the normalized stream, rounded
            to once. Defaults to that of ``weight``.
        backend (str): As in :func:`rms_norm`. Defaults to ``'auto'``.

    Returns:
        tuple[Tensor, Tensor]: The normalized stream and the stream, both of
        the shape of ``hidden``.

    Raises:
        RuntimeError: If the backend cannot run here.
        TypeError: If a dtype does not fit the backend.
        ValueError: If ``weight`` is not (dim,), ``residual`` has not the
            shape of ``hidden``, or the backend is unknown or does not take
            the shape.

    Example:
        >>> x = torch.tensor([3.0, 4.0])
        >>> add_rms_norm(x, x, torch.ones(2))[1]
        tensor([6., 8.])

    Source: arXiv:1910.07467, Eq. 4.
    """
    _check_weight(hidden, weight)
    if residual is not None and residual.shape != hidden.shape:
        raise ValueError(
            f'residual must have the shape of hidden {tuple(hidden.shape)}, '
            f'got {tuple(residual.shape)}'
        )
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    chosen = ADD_BACKENDS.choose(backend, hidden, residual, weight, out_dtype)
    if chosen == 'reference':
        return add_rms_norm_ref(hidden, residual, weight, eps, out_dtype)
    given = add_residual(hidden, None) if residual is None else hidden
    normed, stream = add_rms_norm_op(
        given, residual, weight, eps, out_dtype, chosen
    )
    return normed, given if residual is None else stream


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f'weight must be ({x.shape[-1]},) for x {tuple(x.shape)}, '
            f'got {tuple(weight.shape)}'
        )
