"""What every backend of the scan is given."""

from typing import NamedTuple

import torch
from torch import Tensor


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Real dtype of the state: float32, or float64 if an input is wider."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype.to_real())
    return dtype


class ScanInputs(NamedTuple):
    """Inputs of one or more directions over the same tokens.

    Channels-last; ``directions`` scans run side by side, each with its own
    tensors and its own order of the tokens.
    """

    u: Tensor  # (directions, batch, length, dim)
    delta: Tensor  # as u, before bias and softplus
    A: Tensor  # (directions, dim, state), real or complex
    B: Tensor
    """(directions, batch, length, groups, state): channel d uses group
    ``d // (dim / groups)``; or constant, (directions, dim, state)."""
    C: Tensor  # as B
    D: Tensor | None  # (directions, dim)
    delta_bias: Tensor | None  # (directions, dim)
    delta_softplus: bool
    reverse: tuple[
        bool, ...
    ]  # per direction: from the last token to the first
    b_disc: str  # 'euler' or 'zoh'

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, absent ones as None."""
        return self[:7]

    @property
    def groups(self) -> int:
        """Groups of channels that have a B or a C of their own."""
        return max(
            (m.shape[3] for m in (self.B, self.C) if m.dim() == 5), default=1
        )

    @property
    def real(self) -> torch.dtype:
        """Real dtype of the state."""
        return state_dtype(*self.tensors)

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the state itself."""
        return self.real.to_complex() if self.A.is_complex() else self.real
