"""Selective state-space model: projections and scan of all directions."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmstabvim.layers.directional import DirectionalLinear
from mmstabvim.layers.scan_order import FORWARD, ScanOrder
from mmstabvim.layers.state_matrix import ScanMatrices, build_state_matrix
from mmstabvim.log import print_log
from mmstabvim.ops import selective_scan_directions
from mmstabvim.stability.state.eigenbasis import matrix_exponential_scan


class SelectiveSSM(nn.Module):
    """Selective state-space model that walks the tokens in K directions.

    Step size, B and C are projected from the scan's input, token by token.
    Parameters are stored flat, those of one direction after those of another.

    Args:
        d_inner (int): Channels.
        d_state (int): State size N. Defaults to 16.
        dt_rank (int): Rank of the step size's projection. Defaults to 1.
        order (ScanOrder): Directions. Defaults to one, forward.
        state_matrix (dict, optional): ``type`` and options of the state
            matrix. Defaults to ``dict(type='neg_exp')``.
        b_disc (str): Discretization of B, ``'euler'`` or ``'zoh'``. Defaults
            to ``'euler'``.
        backend (str): Backend of the scan. Defaults to ``'auto'``.

    Attributes:
        x_proj (DirectionalLinear): To dt, B and C.
        dt_proj (DirectionalLinear): From dt to the step size.
        dt_bias (Parameter): (K * d_inner,), added to it before softplus.
        D (Parameter): (K * d_inner,), the skip weight.
        state_matrix (StateMatrix): Of all directions.
        observers (list[Callable]): Called in each forward pass with the step
            sizes (K, batch, length, d_inner), after softplus.

    Source: arXiv:2312.00752, Algorithm 2.

    Example:
        >>> ssm = SelectiveSSM(8, d_state=4)
        >>> ssm(torch.ones(1, 2, 5, 8)).shape
        torch.Size([1, 2, 5, 8])
    """

    dt_min, dt_max, dt_floor = 1e-3, 1e-1, 1e-4
    """Range of the initial step size, and its smallest value, in steps."""

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        dt_rank: int = 1,
        order: ScanOrder = FORWARD,
        state_matrix: dict[str, Any] | None = None,
        b_disc: str = 'euler',
        backend: str = 'auto',
    ) -> None:
        super().__init__()
        count = order.directions
        self.order, self.b_disc, self.backend = order, b_disc, backend
        self.state_matrix = build_state_matrix(
            d_inner, d_state, directions=count, **(state_matrix or {})
        )
        width = self.state_matrix.numbers * d_state
        self.sizes = [dt_rank, width, width]
        self.observers: list[Callable[[Tensor], None]] = []
        self.x_proj = DirectionalLinear(d_inner, sum(self.sizes), count)
        self.dt_proj = DirectionalLinear(dt_rank, d_inner, count)
        self.dt_bias = nn.Parameter(torch.empty(count * d_inner))
        self.D = nn.Parameter(torch.ones(count * d_inner))
        self.reset_step_size()

    @torch.no_grad()
    def reset_step_size(self) -> None:
        """Draw initial step sizes log-uniformly from dt_min to dt_max."""
        self.dt_proj.reset_parameters()
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.empty_like(self.dt_bias).uniform_(low, high).exp_()
        dt.clamp_(min=self.dt_floor)
        # inverse of softplus
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def step_size(self, raw: Tensor) -> Tensor:
        """Compute the step size from its projection, float32 or wider.

        Args:
            raw (Tensor): (directions, batch, length, d_inner).
        """
        wide = torch.promote_types(raw.dtype, torch.float32)
        bias = self.by_direction(self.dt_bias)[:, None, None]
        return F.softplus(raw.to(wide) + bias.to(wide))

    def by_direction(self, flat: Tensor) -> Tensor:
        """View a flat parameter (K * n, ...) as (K, n, ...)."""
        return flat.unflatten(0, (self.order.directions, -1))

    def forward(self, u: Tensor) -> Tensor:
        """Map (directions, batch, length, d_inner) to the same shape."""
        dt, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        delta = self.dt_proj(dt)
        for observer in self.observers:
            observer(self.step_size(delta))
        system = self.state_matrix.scan_matrices(B, C)
        if system is None:
            return self._scan_by_exponential(u, delta, B, C)
        return self._scan(u, delta, system)

    def _scan(self, u: Tensor, delta: Tensor, system: ScanMatrices) -> Tensor:
        """Scan in the precision of A."""
        backend, dtype = self.backend, u.dtype
        if system.A.dtype == torch.complex128:
            u, delta = u.double(), delta.double()
            if backend != 'reference':  # the kernels compute in float32
                backend = 'cpu'
                _say_double(u.device.type)
        y = selective_scan_directions(
            u,
            delta,
            *system,
            self.by_direction(self.D),
            self.by_direction(self.dt_bias),
            delta_softplus=True,
            reverse=self.order.reverse,
            b_disc=self.b_disc,
            backend=backend,
        )
        return y.to(dtype)

    def _scan_by_exponential(
        self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor
    ) -> Tensor:
        """Scan with full matrices that have no usable eigenbasis."""
        matrix = self.state_matrix
        dense = matrix.by_direction(matrix.dense())
        step, skip = self.step_size(delta), self.by_direction(self.D)
        outputs = [
            matrix_exponential_scan(
                u[k], step[k], dense[k], B[k], C[k], skip[k], self.b_disc, back
            )[0]
            for k, back in enumerate(self.order.reverse)
        ]
        return torch.stack(outputs).to(u.dtype)

    def extra_repr(self) -> str:
        """Show the directions in the module's repr."""
        return f'reverse={self.order.reverse}'


@functools.cache
def _say_double(device: str) -> None:
    if device == 'cuda':
        print_log(
            'the eigenvectors of a full state matrix need complex128, which '
            'the Triton kernels do not have: its layers run with PyTorch '
            'operations, many times slower. EigenvalueClampingHook keeps the '
            'condition number below kappa_max',
            level=logging.WARNING,
        )
