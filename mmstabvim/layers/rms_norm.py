"""Module forms of :mod:`mmstabvim.ops.rms_norm`."""

import torch
from torch import Tensor, nn

from mmstabvim.ops import add_rms_norm, rms_norm
from mmstabvim.ops.backend import autocast_dtype, nearest


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a scale per channel.

    Args:
        dim (int): Channels.
        eps (float): Added to the mean square. Defaults to 1e-5.
        backend (str): Backend of the model's operators. Defaults to
            ``'auto'``.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, backend: str = 'auto'
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.backend = eps, backend

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., dim) in float32; the result has weight's dtype."""
        backend = nearest('rms_norm', self.backend)
        normed = rms_norm(x, self.weight, self.eps, backend=backend)
        return normed.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Show the size in the module's repr."""
        return f'{self.weight.numel()}, eps={self.eps}'


class AddRMSNorm(RMSNorm):
    """Add to a residual stream and normalize it, for a linear layer to read.

    Args:
        dim (int): Channels.
        eps (float): Added to the mean square. Defaults to 1e-5.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the normalized stream and the stream.

        Args:
            hidden (Tensor): (..., dim), what to add.
            residual (Tensor, optional): (..., dim), the stream so far.

        Returns:
            tuple[Tensor, Tensor]: The first in the dtype of the weight, on a
            GPU in that of autocast, to which a linear layer would convert
            it; the second in float32 or wider.
        """
        dtype = self.weight.dtype
        if hidden.is_cuda and dtype != torch.float64:
            dtype = autocast_dtype(hidden.device) or dtype
        return add_rms_norm(
            hidden,
            residual,
            self.weight,
            self.eps,
            dtype,
            backend=nearest('add_rms_norm', self.backend),
        )
