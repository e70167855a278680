"""Parametrizations of the continuous-time state matrix A."""

import torch
from torch import Tensor, nn


class NegExpStateMatrix(nn.Module):
    """Real negative diagonal ``A = -exp(A_log)``, as in Mamba and Vim.

    Initialized to S4D-Real: ``A[d, n] = -(n + 1)``. Always stable: every
    eigenvalue is negative.

    Args:
        d_inner (int): Channels.
        d_state (int): State size N.

    Source: arXiv:2206.11893, Sec. 4 (S4D-Real).
    """

    def __init__(self, d_inner: int, d_state: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize to S4D-Real."""
        modes = torch.arange(1, self.A_log.shape[1] + 1, dtype=torch.float32)
        with torch.no_grad():
            self.A_log.copy_(modes.log().expand_as(self.A_log))

    def forward(self) -> Tensor:
        """Return A, (d_inner, d_state), 1/step, float32 or wider."""
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        return -torch.exp(self.A_log.to(wide))


STATE_MATRICES = {'neg_exp': NegExpStateMatrix}


def build_state_matrix(
    d_inner: int, d_state: int, type: str = 'neg_exp'
) -> nn.Module:
    """Build a state matrix by the name of its parametrization.

    Args:
        d_inner (int): Channels.
        d_state (int): State size N.
        type (str): Name in ``STATE_MATRICES``. Defaults to ``'neg_exp'``.

    Returns:
        nn.Module: Called without arguments it returns A.

    Raises:
        ValueError: If the name is unknown.
    """
    if type not in STATE_MATRICES:
        raise ValueError(
            f'state_matrix type must be one of {sorted(STATE_MATRICES)}, '
            f'got {type!r}'
        )
    return STATE_MATRICES[type](d_inner, d_state)
