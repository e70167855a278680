"""Inputs of every backend of the scan."""

from typing import NamedTuple

import torch
from torch import Tensor

_DOUBLE = (torch.float64, torch.complex128)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def state_dtypes(
    A: Tensor, *others: Tensor | None
) -> tuple[torch.dtype, torch.dtype]:
    """Choose the dtypes of the output and of the state.

    Args:
        A (Tensor): State matrix, real or complex.
        *others (Tensor | None): The other inputs.

    Returns:
        tuple[torch.dtype, torch.dtype]: float32, or float64 if an input is
        wider; and the complex counterpart if A is complex, else the same.
    """
    # torch.export knows no dtype.to_real()
    wide = any(x is not None and x.dtype in _DOUBLE for x in (A, *others))
    real = torch.float64 if wide else torch.float32
    return real, _COMPLEX[real] if A.is_complex() else real


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
    reverse: tuple[bool, ...]
    """For each direction: walk from the last token to the first."""
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
        return state_dtypes(self.A, *self.tensors)[0]

    @property
    def wide(self) -> torch.dtype:
        """Dtype of the state itself."""
        return state_dtypes(self.A, *self.tensors)[1]
