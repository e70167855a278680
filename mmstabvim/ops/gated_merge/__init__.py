"""Merge of the directions' outputs under one gate."""

from torch import Tensor

from mmstabvim.ops.gated_merge.function import BACKENDS, gated_merge_op
from mmstabvim.ops.gated_merge.reference import gated_merge_ref

__all__ = ['BACKENDS', 'REDUCTIONS', 'gated_merge', 'gated_merge_ref']

REDUCTIONS = ('mean', 'sum')


def gated_merge(
    y: Tensor, z: Tensor, reduction: str = 'mean', backend: str = 'auto'
) -> Tensor:
    """Merge directions under one gate, ``mean_k y[k] * silu(z)``.

    Computed in float32 or wider, whatever autocast says, and rounded once.

    Args:
        y (Tensor): (directions, batch, length, dim), the directions' outputs,
            any floating dtype.
        z (Tensor): (batch, length, dim), gate before SiLU, any floating
            dtype, any strides.
        reduction (str): ``'mean'`` or ``'sum'`` of the directions. Defaults
            to ``'mean'``.
        backend (str): ``'auto'``, ``'reference'`` (PyTorch) or ``'triton'``
            (at most 32 bits), whose kernel reads each input once, in both
            passes. ``'auto'`` obeys the environment variable
            MMSTABVIM_BACKEND, else is ``'triton'`` on a GPU where it fits
            and ``'reference'`` elsewhere. Defaults to ``'auto'``.

    Returns:
        Tensor: (batch, length, dim), dtype of ``y``.

    Raises:
        RuntimeError: If the backend cannot run here.
        TypeError: If a dtype does not fit the backend.
        ValueError: If the shapes do not fit, there is no direction, or a
            name is unknown.

    Example:
        >>> import torch
        >>> y, z = torch.ones(2, 1, 3, 4), torch.zeros(1, 3, 4)
        >>> gated_merge(y, z).shape
        torch.Size([1, 3, 4])

    Source: arXiv:2401.09417, Algorithm 1 (the published models divide the sum
    of the two directions by two).
    """
    if y.dim() != 4 or y.shape[1:] != z.shape or len(y) == 0:
        raise ValueError(
            'y must be (directions, batch, length, dim) and z (batch, length, '
            f'dim), got {tuple(y.shape)} and {tuple(z.shape)}'
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f'reduction must be one of {REDUCTIONS}, got {reduction!r}'
        )
    divisor = len(y) if reduction == 'mean' else 1
    chosen = BACKENDS.choose(backend, y, z)
    if chosen == 'reference':
        return gated_merge_ref(y, z, divisor)
    merged: Tensor = gated_merge_op(y, z, divisor, chosen)
    return merged
