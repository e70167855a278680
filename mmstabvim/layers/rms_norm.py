"""Module form of :func:`mmstabvim.ops.rms_norm`."""

import torch
from torch import Tensor, nn

from mmstabvim.ops import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a scale per channel.

    Args:
        dim (int): Channels.
        eps (float): Added to the mean square. Defaults to 1e-5.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., dim) in float32; the result has weight's dtype."""
        return rms_norm(x, self.weight, self.eps).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Show the size in the module's repr."""
        return f'{self.weight.numel()}, eps={self.eps}'
