"""Matrices that are block-diagonal plus low rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockLowRank(NamedTuple):
    """Parameters of matrices ``blkdiag(blocks) + U V^T``."""

    blocks: Tensor
    """(groups, K, b, b), 1/step."""
    U: Tensor
    """(groups, K b, r); r may be 0."""
    V: Tensor
    """Second factor, shape of ``U``."""

    def dense(self) -> Tensor:
        """Assemble the matrices, (groups, N, N), 1/step."""
        return _block_diagonal(self.blocks) + self.U @ self.V.mT

    def to(self, dtype: torch.dtype) -> BlockLowRank:
        """Convert all three."""
        return BlockLowRank(*(x.to(dtype) for x in self))

    def at(self, index: Tensor) -> BlockLowRank:
        """Take some of the matrices."""
        return BlockLowRank(*(x[index] for x in self))

    def put(self, index: Tensor, other: BlockLowRank) -> BlockLowRank:
        """Replace some of the matrices."""
        new = BlockLowRank(*(x.clone() for x in self))
        for old, value in zip(new, other, strict=True):
            old[index] = value.to(old.dtype)
        return new

    def shifted(self, shift: Tensor) -> BlockLowRank:
        """Subtract ``shift I``, (groups,), from the blocks."""
        eye = torch.eye(self.blocks.shape[-1]).to(self.blocks)
        return self._replace(
            blocks=self.blocks - shift[:, None, None, None] * eye
        )

    def scaled(self, scale: Tensor) -> BlockLowRank:
        """Divide by ``scale``, (groups,); U and V by its root."""
        root = scale.sqrt()[:, None, None]
        return BlockLowRank(
            self.blocks / scale[:, None, None, None],
            self.U / root,
            self.V / root,
        )

    def blended(self, other: Tensor, share: Tensor) -> BlockLowRank:
        """Form ``(1 - s) A + s E``, exactly in the structure.

        Args:
            other (Tensor): (groups, K, b, b), the blocks of E.
            share (Tensor): (groups,), s in [0, 1].
        """
        s = share[:, None, None, None]
        root = (1 - share).sqrt()[:, None, None]
        return BlockLowRank(
            (1 - s) * self.blocks + s * other, self.U * root, self.V * root
        )


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(groups, K, b, b) to (groups, K b, K b)."""
    eye = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    # (groups, K, b, 1, b) times (K, 1, K, 1)
    dense = blocks[:, :, :, None] * eye[:, None, :, None]
    return dense.flatten(3, 4).flatten(1, 2)
