"""Add, normalize, mix: one layer of Vision Mamba."""

from typing import Any

from torch import Tensor, nn

from mmstabvim.layers.drop_path import DropPath
from mmstabvim.layers.mamba_mixer import MambaMixer
from mmstabvim.layers.rms_norm import AddRMSNorm
from mmstabvim.ops.rms_norm import add_residual

__all__ = ['VisionMambaBlock', 'add_residual']


class VisionMambaBlock(nn.Module):
    """Pre-norm block that carries the residual stream beside its output.

    The mixer's output is added to the residual by the *next* block (after the
    last one by the backbone), so a block returns both.

    Args:
        d_model (int): Channels of the tokens.
        drop_path (float): Probability of dropping the *incoming* mixer
            output, per sample. Defaults to 0.0.
        backend (str): Backend of the operators. Defaults to ``'auto'``.
        **mixer (Any): Further arguments of :class:`MambaMixer`.
    """

    def __init__(
        self,
        d_model: int,
        drop_path: float = 0.0,
        backend: str = 'auto',
        **mixer: Any,
    ) -> None:
        super().__init__()
        self.norm = AddRMSNorm(d_model, backend=backend)
        self.mixer = MambaMixer(d_model, backend=backend, **mixer)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mixer's output and the residual stream it has read.

        Args:
            hidden (Tensor): (batch, length, d_model), the previous block's
                output, or the embedded tokens.
            residual (Tensor, optional): (batch, length, d_model), the
                previous block's residual stream, float32 or wider.

        Returns:
            tuple[Tensor, Tensor]: Two tensors of the same shape.
        """
        normed, residual = self.norm(self.drop_path(hidden), residual)
        return self.mixer(normed), residual
