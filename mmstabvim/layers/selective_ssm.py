"""One direction of the mixer: convolution, projections, selective scan."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmstabvim.layers.state_matrix import build_state_matrix
from mmstabvim.ops import causal_conv1d, selective_scan


class SelectiveSSM(nn.Module):
    """Selective state-space model that walks the tokens in one direction.

    Depthwise causal convolution and SiLU give the scan's input; step size, B
    and C are projected from it, token by token.

    Args:
        d_inner (int): Channels.
        d_state (int): State size N. Defaults to 16.
        d_conv (int): Width of the convolution, tokens. Defaults to 4.
        dt_rank (int): Rank of the step size's projection. Defaults to 1.
        reverse (bool): Walk from the last token to the first. Defaults to
            False.
        state_matrix (dict, optional): ``type`` and options of the state
            matrix. Defaults to ``dict(type='neg_exp')``.
        b_disc (str): Discretization of B, ``'euler'`` or ``'zoh'``. Defaults
            to ``'euler'``.
        backend (str): Backend of the scan. Defaults to ``'auto'``.

    Source: arXiv:2312.00752, Algorithm 2; arXiv:2401.09417, Algorithm 1.
    """

    dt_min, dt_max, dt_floor = 1e-3, 1e-1, 1e-4
    """Range of the initial step size, and its smallest value, in steps."""

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int = 1,
        reverse: bool = False,
        state_matrix: dict[str, Any] | None = None,
        b_disc: str = 'euler',
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.sizes = [dt_rank, d_state, d_state]
        self.reverse, self.b_disc, self.backend = reverse, b_disc, backend
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.state_matrix = build_state_matrix(
            d_inner, d_state, **(state_matrix or {})
        )
        self.D = nn.Parameter(torch.ones(d_inner))
        self.reset_step_size()

    @torch.no_grad()
    def reset_step_size(self) -> None:
        """Initial step sizes: log-uniform between dt_min and dt_max."""
        bound = self.dt_proj.in_features**-0.5
        self.dt_proj.weight.uniform_(-bound, bound)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp_()
        dt.clamp_(min=self.dt_floor)
        # inverse of softplus
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, d_inner) to the scan's output, same shape."""
        kernel = self.conv1d.weight.squeeze(1)
        u = causal_conv1d(
            x, kernel, self.conv1d.bias, self.reverse, activation='silu'
        )
        dt, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        y = selective_scan(
            u,
            F.linear(dt, self.dt_proj.weight),
            self.state_matrix(),
            B,
            C,
            self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            reverse=self.reverse,
            b_disc=self.b_disc,
            channels_last=True,
            backend=self.backend,
        )
        return cast(Tensor, y)  # alone, without the last state

    def extra_repr(self) -> str:
        """Show the direction in the module's repr."""
        return f'reverse={self.reverse}'
