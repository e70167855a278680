"""Mean of the directions' outputs, gated."""

from torch import Tensor

from mmstabvim.ops.gated_merge.function import gated_merge_op, supports_triton
from mmstabvim.ops.gated_merge.reference import gated_merge_ref

__all__ = ['gated_merge', 'gated_merge_ref']


def gated_merge(y: Tensor, z: Tensor) -> Tensor:
    """Merge directions under one gate, ``mean_k y[k] * silu(z)``.

    Computed in float32 or wider, whatever autocast says, and rounded once.
    On a GPU a Triton kernel reads each input once, in both passes; elsewhere
    and for float64 it is PyTorch.

    Args:
        y (Tensor): (directions, batch, length, dim), the directions' outputs,
            any floating dtype.
        z (Tensor): (batch, length, dim), gate before SiLU, any floating
            dtype, any strides.

    Returns:
        Tensor: (batch, length, dim), dtype of ``y``.

    Raises:
        ValueError: If the shapes do not fit or there is no direction.

    Source: arXiv:2401.09417, Algorithm 1 (the published models divide the sum
    of the two directions by two).
    """
    if y.dim() != 4 or y.shape[1:] != z.shape or len(y) == 0:
        raise ValueError(
            'y must be (directions, batch, length, dim) and z (batch, length, '
            f'dim), got {tuple(y.shape)} and {tuple(z.shape)}'
        )
    merge = gated_merge_op if supports_triton(y, z) else gated_merge_ref
    return merge(y, z)
