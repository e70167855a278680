"""One direction of the mixer: convolution, projections, selective scan."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmstabvim.layers.state_matrix import ScanMatrices, build_state_matrix
from mmstabvim.log import print_log
from mmstabvim.ops import causal_conv1d_directions, selective_scan_directions
from mmstabvim.stability.state.eigenbasis import matrix_exponential_scan


class _Linear(nn.Linear):
    pass


class StepProjection(_Linear):
    """Linear layer whose initial values mean something: the step sizes.

    MMEngine's rules of an ``init_cfg`` go by the name of a class and of the
    one that it is derived from, so one for ``Linear`` passes over this.
    """


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

    ``observers`` are called in each forward pass with the step sizes
    (batch, length, d_inner), after softplus.

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
        self.state_matrix = build_state_matrix(
            d_inner, d_state, **(state_matrix or {})
        )
        width = self.state_matrix.numbers * d_state
        self.sizes = [dt_rank, width, width]
        self.reverse, self.b_disc, self.backend = reverse, b_disc, backend
        self.observers: list[Callable[[Tensor], None]] = []
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, sum(self.sizes), bias=False)
        self.dt_proj = StepProjection(dt_rank, d_inner)
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

    def step_size(self, raw: Tensor) -> Tensor:
        """Step size from its projection, float32 or wider."""
        wide = torch.promote_types(raw.dtype, torch.float32)
        return F.softplus(raw.to(wide) + self.dt_proj.bias.to(wide))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, d_inner) to the scan's output, same shape."""
        return run_directions([self], x)[0]

    def extra_repr(self) -> str:
        """Show the direction in the module's repr."""
        return f'reverse={self.reverse}'


def run_directions(directions: Sequence[SelectiveSSM], x: Tensor) -> Tensor:
    """Run several selective SSMs of one shape over the same tokens.

    Each operation takes all directions at once.

    Args:
        directions (Sequence[SelectiveSSM]): At least one; sizes, ``b_disc``
            and ``backend`` are those of the first.
        x (Tensor): (batch, length, d_inner).

    Returns:
        Tensor: (directions, batch, length, d_inner), the scans' outputs.
    """
    u = causal_conv1d_directions(
        x,
        torch.stack([d.conv1d.weight.squeeze(1) for d in directions]),
        torch.stack([cast(Tensor, d.conv1d.bias) for d in directions]),
        [d.reverse for d in directions],
        activation='silu',
    )
    dt, B, C = _project(u, [d.x_proj.weight for d in directions]).split(
        directions[0].sizes, dim=-1
    )
    delta = _project(dt, [d.dt_proj.weight for d in directions])
    for d, step in zip(directions, delta, strict=True):
        for observer in d.observers:
            observer(d.step_size(step))
    systems = [
        d.state_matrix.scan_matrices(B[k], C[k])
        for k, d in enumerate(directions)
    ]
    usable = [system for system in systems if system is not None]
    alike = len({system.A.dtype for system in usable}) == 1
    if alike and len(usable) == len(systems):
        return _scan(directions, u, delta, usable)
    each = zip(directions, u, delta, B, C, systems, strict=True)
    return torch.stack([_scan_alone(*given) for given in each])


def _project(x: Tensor, weights: list[Tensor]) -> Tensor:
    """(directions, batch, length, in) to (..., out), a weight for each."""
    product = torch.bmm(x.flatten(1, 2), torch.stack(weights).mT)
    return product.unflatten(1, x.shape[1:3])


def _scan(
    directions: Sequence[SelectiveSSM],
    u: Tensor,
    delta: Tensor,
    systems: Sequence[ScanMatrices],
) -> Tensor:
    """All directions at once, in the precision of A."""
    first, backend, dtype = directions[0], directions[0].backend, u.dtype
    A, B, C = (torch.stack(m) for m in zip(*systems, strict=True))
    if A.dtype == torch.complex128:
        u, delta = u.double(), delta.double()
        if u.is_cuda and backend == 'auto':
            backend = _in_double()
    y = selective_scan_directions(
        u,
        delta,
        A,
        B,
        C,
        torch.stack([d.D for d in directions]),
        torch.stack([d.dt_proj.bias for d in directions]),
        delta_softplus=True,
        reverse=[d.reverse for d in directions],
        b_disc=first.b_disc,
        backend=backend,
    )
    return y.to(dtype)


@functools.cache
def _in_double() -> str:
    """The backend of a GPU for double precision."""
    print_log(
        'the eigenvectors of a full state matrix need complex128, which the '
        'Triton kernels do not have: its layers run with PyTorch operations, '
        'many times slower. EigenvalueClampingHook keeps the condition number '
        'below kappa_max',
        level=logging.WARNING,
    )
    return 'cpu'


def _scan_alone(
    direction: SelectiveSSM,
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    system: ScanMatrices | None,
) -> Tensor:
    """One direction, by the matrix exponential if it has no eigenbasis."""
    if system is not None:
        return _scan([direction], u[None], delta[None], [system])[0]
    y, _ = matrix_exponential_scan(
        u,
        direction.step_size(delta),
        direction.state_matrix.dense(),
        B,
        C,
        direction.D,
        direction.b_disc,
        direction.reverse,
    )
    return y.to(u.dtype)
