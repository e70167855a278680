"""The ``triton`` backend: launches the kernels of ``kernels.py``.

The signatures, results and stored states' shape of ``cpu.py``. Tile sizes
follow from the shape alone, and every sum has a fixed order: the same bits
from run to run. Import this file only where it is used: it imports triton.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from mmstabvim.ops.selective_scan.cpu import CHUNK
from mmstabvim.ops.selective_scan.kernels import (
    _scan_bwd_kernel,
    _scan_fwd_kernel,
)
from mmstabvim.ops.selective_scan.reference import compute_dtype, num_groups

MAX_STATE = 64
"""States per channel that a tile can hold."""

TILE_NUMEL = 512
"""Numbers in a real tile: 16 registers in each lane of one warp."""

FORWARD_OPTIONS: dict[str, Any] = dict(num_warps=1)
BACKWARD_OPTIONS: dict[str, Any] = dict(num_warps=1, maxnreg=255)
"""Left to itself, the assembler spills here to fit one more warp."""


@torch.no_grad()
def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    b_disc: str,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.cpu.forward`; chunks are counted in the order of the walk.

    Raises:
        RuntimeError: If the tensors are not on a GPU and triton does not
            interpret.
        TypeError: If an input is float64 or complex128.
        ValueError: If the state has more than 64 modes.
    """
    call = _Call(
        u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, b_disc
    )
    batch, length, dim = u.shape
    groups, state = call.groups, A.shape[1]
    chunks = triton.cdiv(length, CHUNK) if keep_states else 0
    y = call.empty(u.shape)
    last = call.empty_state((batch, dim, state))
    borders = call.empty_state((chunks, batch, groups, state, dim // groups))
    call.launch(
        _scan_fwd_kernel,
        FORWARD_OPTIONS,
        *call.inputs,
        y,
        _as_real(last),
        _as_real(borders) if keep_states else None,
    )
    return y, last, borders


@torch.no_grad()
def backward(
    dy: Tensor,
    dlast: Tensor | None,
    borders: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    b_disc: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`.cpu.backward`, from the ``borders`` of this forward."""
    call = _Call(
        u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, b_disc
    )
    batch, _, dim = u.shape
    scratch = call.empty_state((CHUNK, *borders.shape[1:]))
    du, ddelta = call.empty(u.shape), call.empty(u.shape)
    dA = call.empty_state((batch, *A.shape))
    dB, dC = call.matrix_parts(B), call.matrix_parts(C)
    dD, dbias = call.empty((batch, dim)), call.empty((batch, dim))
    call.launch(
        _scan_bwd_kernel,
        BACKWARD_OPTIONS,
        dy.contiguous(),
        None if dlast is None else _as_real(dlast.to(call.wide)),
        _as_real(borders),
        *call.inputs,
        *(_as_real(x) for x in (scratch, du, ddelta, dA, dB, dC, dD, dbias)),
    )
    return (
        du,
        ddelta,
        dA.sum(0),
        _sum_parts(dB, B),
        _sum_parts(dC, C),
        du.new_empty(0) if D is None else dD.sum(0),
        du.new_empty(0) if delta_bias is None else dbias.sum(0),
    )


class _Call:
    """Arguments common to both passes, and how to launch a kernel."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        b_disc: str,
    ) -> None:
        batch, length, dim = u.shape
        state = A.shape[1]
        _check(u, A, delta, B, C, D, delta_bias)
        self.complex_a = A.is_complex()
        self.wide = torch.complex64 if self.complex_a else torch.float32
        self.groups = num_groups(B, C)
        self.device = u.device
        block_n, block_d = tile_shape(state, self.complex_a)
        channels = dim // self.groups
        blocks = triton.cdiv(channels, block_d)
        self.grid = (batch * self.groups, blocks)
        self.parts = (blocks, batch, length, self.groups, state)
        B, C = (self._strided(m) for m in (B, C))
        optional = (
            None if x is None else x.contiguous() for x in (D, delta_bias)
        )
        self.inputs = (
            u.contiguous(),
            delta.contiguous(),
            _as_real(A.to(self.wide)),
            *(torch.view_as_real(m) if self.complex_a else m for m in (B, C)),
            *optional,
        )
        strides = (
            m.stride()[:3] if m.dim() == 4 else (0, 0, 0) for m in (B, C)
        )
        self.scalars = (
            length,
            self.groups,
            channels,
            state,
            *(x for stride in strides for x in stride),
        )
        self.constants = dict(
            CONSTANT_B=B.dim() == 2,
            CONSTANT_C=C.dim() == 2,
            SOFTPLUS=delta_softplus,
            REVERSE=reverse,
            ZOH=b_disc == 'zoh',
            COMPLEX=self.complex_a,
            CHUNK=CHUNK,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )

    def _strided(self, matrix: Tensor) -> Tensor:
        """B or C with states side by side and a group axis of full size."""
        if self.complex_a:
            matrix = matrix.to(self.wide).resolve_conj()
        if matrix.dim() == 2:
            return matrix.contiguous()
        if matrix.stride(3) != 1:
            matrix = matrix.contiguous()
        return matrix.expand(-1, -1, self.groups, -1)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def empty_state(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def matrix_parts(self, matrix: Tensor) -> Tensor:
        """Gradient of B or C: a part per channel block, or per sequence."""
        if matrix.dim() == 2:
            return self.empty_state((self.parts[1], *matrix.shape))
        return self.empty_state(self.parts)

    def launch(
        self, kernel: Any, options: dict[str, Any], *tensors: Tensor | None
    ) -> None:
        with torch.cuda.device_of(self.inputs[0]):
            kernel[self.grid](
                *tensors, *self.scalars, **self.constants, **options
            )


def tile_shape(state: int, complex_a: bool) -> tuple[int, int]:
    """States and channels of a tile, powers of two.

    Complex tiles have half as many numbers: their formulas keep more of them
    alive, and the backward pass must fit into the registers of one warp.
    """
    block_n = triton.next_power_of_2(state)
    per_channel = 4 * block_n if complex_a else block_n
    return block_n, min(32, TILE_NUMEL // per_channel)


def _check(u: Tensor, A: Tensor, *others: Tensor | None) -> None:
    """Refuse what the kernels would compute wrongly or not at all."""
    if compute_dtype(u, A, *others) != torch.float32:
        raise TypeError(
            'the triton backend keeps a float32 state, got a float64 input; '
            "use backend='cpu', which runs on any device"
        )
    if A.shape[1] > MAX_STATE:
        raise ValueError(
            f'the triton backend takes at most {MAX_STATE} states, got A '
            f"{tuple(A.shape)}; use backend='cpu', which runs on any device"
        )
    if u.device.type != 'cuda' and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f'the triton backend needs a GPU, got tensors on {u.device}; '
            'set TRITON_INTERPRET=1 before the first import to debug on a CPU'
        )


def _as_real(x: Tensor) -> Tensor:
    """Contiguous memory, complex numbers as pairs."""
    x = x.resolve_conj().contiguous()
    return torch.view_as_real(x) if x.is_complex() else x


def _sum_parts(parts: Tensor, matrix: Tensor) -> Tensor:
    """Gradient of B or C in its shape."""
    total = parts.sum(0)
    if total.shape == matrix.shape:
        return total
    return total.sum(2, keepdim=True)
