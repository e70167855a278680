"""Two-dimensional rotary position embedding."""

import torch
from torch import Tensor, nn

from mmstabvim.layers.position_embedding import join_tokens, split_tokens


class RotaryEmbedding2d(nn.Module):
    """Rotate channel pairs by angles that grow with row and column.

    The first half of the channels is rotated by the row, the second half by
    the column: pair i of a half turns by ``p / 10000**(2 i / half)`` with the
    position ``p = index / size * base_size``, so a larger grid spans the same
    angles. Class tokens are not rotated.

    Args:
        dim (int): Channels, a multiple of 4.
        base_size (int): Positions that one side of the grid spans. Defaults
            to 14.

    Raises:
        ValueError: If ``dim`` is no multiple of 4.

    Source: arXiv:2104.09864, Eq. 34, once for each axis.
    """

    def __init__(self, dim: int, base_size: int = 14) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(
                f'rotary embedding needs embed_dims % 4 == 0, got {dim}'
            )
        self.dim, self.base_size = dim, base_size

    def angles(
        self, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each token's angles.

        Returns:
            tuple[Tensor, Tensor]: (rows * columns, dim / 2), float32.
        """
        half = self.dim // 2
        exponent = torch.arange(0, half, 2, device=device) / half
        frequency = 10000.0**-exponent  # (dim / 4,)
        axes = [
            torch.arange(size, device=device) / size * self.base_size
            for size in grid
        ]
        row, column = (axis[:, None] * frequency for axis in axes)
        shape = (*grid, half // 2)
        angle = torch.cat(
            [row[:, None].expand(shape), column[None].expand(shape)], dim=-1
        ).flatten(0, 1)
        return angle.cos(), angle.sin()

    def forward(
        self, x: Tensor, grid: tuple[int, int], cls_token: str | None
    ) -> Tensor:
        """Rotate the patches of a sequence.

        Args:
            x (Tensor): (batch, rows * columns + class tokens, dim).
            grid (tuple[int, int]): Rows and columns.
            cls_token (str | None): Layout of the class tokens.

        Returns:
            Tensor: Shape and dtype of ``x``.
        """
        tokens, patches = split_tokens(x, cls_token)
        cos, sin = (a.to(x.dtype) for a in self.angles(grid, x.device))
        even, odd = patches.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack(
            [even * cos - odd * sin, odd * cos + even * sin], dim=-1
        )
        return join_tokens(tokens, turned.flatten(-2), cls_token)
