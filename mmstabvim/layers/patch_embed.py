"""From an image to a grid of tokens."""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Convolution whose kernel is one patch.

    An image that the patches do not cover exactly is padded with zeros at
    the bottom and at the right, so no pixel is dropped.

    Args:
        in_channels (int): Channels of the image.
        embed_dims (int): Channels of the tokens.
        patch_size (int): Side of a patch, pixels.
        stride (int): Distance of two patches, pixels; patches overlap where
            it is smaller than ``patch_size``.
    """

    def __init__(
        self, in_channels: int, embed_dims: int, patch_size: int, stride: int
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            in_channels, embed_dims, patch_size, stride
        )

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an image.

        Raises:
            ValueError: If the image is smaller than a patch.
        """
        patch, stride = self.projection.kernel_size, self.projection.stride
        if height < patch[0] or width < patch[1]:
            raise ValueError(
                f'image must be at least one patch, {patch[0]}x{patch[1]} '
                f'pixels, got {height}x{width}'
            )
        rows, columns = (
            -(-(size - p) // s) + 1
            for size, p, s in zip((height, width), patch, stride, strict=True)
        )
        return rows, columns

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed an image.

        Args:
            image (Tensor): (batch, in_channels, height, width).

        Returns:
            tuple[Tensor, tuple[int, int]]: Tokens in row-major order (batch,
            rows * columns, embed_dims), and (rows, columns).
        """
        height, width = image.shape[-2:]
        grid = self.grid_size(height, width)
        patch, stride = self.projection.kernel_size, self.projection.stride
        bottom, right = (
            (n - 1) * s + p - size
            for n, s, p, size in zip(
                grid, stride, patch, (height, width), strict=True
            )
        )
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        return self.projection(image).flatten(2).transpose(1, 2), grid
