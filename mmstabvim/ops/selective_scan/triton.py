"""The ``triton`` backend: launches the kernels of ``kernels*.py``.

The signatures and results of ``cpu.py``; y and the gradients of u and delta
are in half precision if u and delta are. All directions run in one launch.
Tile sizes and the split over the length follow from the shape alone, and
every sum has a fixed order: the same bits from run to run. Import this file
only where it is used: it imports triton.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmstabvim.ops.selective_scan.inputs import ScanInputs
from mmstabvim.ops.selective_scan.kernels import (
    _scan_ends_kernel,
    _scan_fwd_kernel,
)
from mmstabvim.ops.selective_scan.kernels_backward import (
    _adjoint_ends_kernel,
    _scan_bwd_kernel,
)

CHUNK = 6
"""Tokens between two stored states.

With N states, they cost 4 N / CHUNK bytes per token and channel, written once
and read once, and what lies between is recomputed: (CHUNK - GROUP) / (2 CHUNK)
of the forward pass, besides each token once. At N = 16 that is 11 bytes and a
tenth of the backward kernel's instructions. It is bound by instructions, not
by traffic; the same states in a scratch of every token took 128 bytes.
"""

GROUP = 3
"""Tokens in flight; the backward kernel holds their states in registers.

Four spill at N = 16 on the A100.
"""

TILE_NUMEL = 512
"""Numbers in a real tile: 16 registers in each lane of one warp."""

ENOUGH_PROGRAMS = 1056
"""Two warps for each scheduler of 132 multiprocessors: no split from here on.

A split costs 0.7 times a forward pass and 0.2 times a backward pass.
"""

SHORTEST_SPAN = 64
"""Tokens of a span, at least, where the length is split."""

MAX_STEP = 1 << 28
"""Numbers from one token to the next that 32-bit offsets reach."""

CONSTANT_DIMS = 3
"""Axes of a constant B or C: (directions, dim, state)."""

FORWARD_OPTIONS: dict[str, Any] = dict(num_warps=1, maxnreg=160)
ENDS_OPTIONS: dict[str, Any] = dict(num_warps=1)
BACKWARD_OPTIONS: dict[str, Any] = dict(num_warps=1, maxnreg=255)
"""Left to itself, the assembler spills here to fit one more warp."""


def output_dtype(inputs: ScanInputs) -> torch.dtype:
    """Return the dtype of y and of the gradients of u and delta."""
    half = (torch.bfloat16, torch.float16)
    if inputs.u.dtype in half and inputs.delta.dtype == inputs.u.dtype:
        return inputs.u.dtype
    return torch.float32


def borders_shape(inputs: ScanInputs, keep_states: bool) -> tuple[int, ...]:
    """Return (directions, batch, chunks, dim, state); chunks as walked."""
    directions, batch, length, dim = inputs.u.shape
    chunks = triton.cdiv(length, CHUNK) if keep_states else 0
    return directions, batch, chunks, dim, inputs.A.shape[2]


@torch.no_grad()
def forward(
    inputs: ScanInputs, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`.cpu.forward`, with borders of its own."""
    call = _Call(inputs)
    directions, batch, _, dim = inputs.u.shape
    y = torch.empty(
        inputs.u.shape, dtype=output_dtype(inputs), device=call.device
    )
    last = call.empty_state((directions, batch, dim, call.state))
    borders = call.empty_state(borders_shape(inputs, keep_states))
    call.split(_scan_ends_kernel)
    call.launch(
        _scan_fwd_kernel,
        FORWARD_OPTIONS,
        call.forward_tile,
        GROUP=call.forward_group,
        y_ptr=y,
        last_ptr=_as_real(last),
        borders_ptr=_as_real(borders) if keep_states else None,
    )
    return y, last, borders


@torch.no_grad()
def backward(
    dy: Tensor, dlast: Tensor | None, borders: Tensor, inputs: ScanInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute :func:`.cpu.backward`, from the ``borders`` of this forward."""
    call = _Call(inputs)
    dy = _rows(dy)
    call.arguments |= dict(dy_ptr=dy, dy_strides=dy.stride()[:3])
    call.split(_adjoint_ends_kernel)
    du, ddelta = (
        torch.empty(x.shape, dtype=output_dtype(inputs), device=call.device)
        for x in (inputs.u, inputs.delta)
    )
    dA = call.empty_state((*call.sums, call.state))
    dB, dC = call.empty_parts(inputs.B), call.empty_parts(inputs.C)
    dD, dbias = call.empty(call.sums), call.empty(call.sums)
    call.launch(
        _scan_bwd_kernel,
        BACKWARD_OPTIONS,
        call.backward_tile,
        GROUP=call.backward_group,
        dlast_ptr=None if dlast is None else _as_real(dlast.to(call.wide)),
        borders_ptr=_as_real(borders),
        du_ptr=du,
        ddelta_ptr=ddelta,
        dA_ptr=_as_real(dA),
        dB_ptr=_as_real(dB),
        dC_ptr=_as_real(dC),
        dD_ptr=dD,
        dbias_ptr=dbias,
    )
    return (
        du,
        ddelta,
        dA.sum((0, 2)),
        _sum_parts(dB, inputs.B),
        _sum_parts(dC, inputs.C),
        du.new_empty(0) if inputs.D is None else dD.sum((0, 2)),
        du.new_empty(0) if inputs.delta_bias is None else dbias.sum((0, 2)),
    )


class Tile(NamedTuple):
    """States and channels of a tile, in and across lanes; powers of two."""

    NR: int  # states in a lane
    NL: int  # lanes that share a channel
    DL: int  # lanes that share a state
    DR: int  # channels in a lane


class _Call:
    """Arguments common to the kernels, by name, and how to launch them."""

    def __init__(self, inputs: ScanInputs) -> None:
        directions, batch, length, dim = inputs.u.shape
        count, self.state = inputs.groups, inputs.A.shape[2]
        complex_a = inputs.A.is_complex()
        self.wide, self.device = inputs.wide, inputs.u.device
        channels, bias = dim // count, inputs.delta_bias
        self.forward_tile, self.backward_tile = tiles(
            self.state, channels, complex_a, inputs.b_disc
        )
        self.forward_group, self.backward_group = groups(inputs.b_disc)
        block_d = self.forward_tile.DL * self.forward_tile.DR
        blocks = triton.cdiv(channels, block_d)
        programs = directions * batch * count * blocks
        span = span_length(programs, length)
        spans = triton.cdiv(length, span)
        self.grid = (programs, spans)
        self.sums = (spans, directions, batch, dim)
        self.parts = (blocks, directions, batch, length, count, self.state)
        self.arguments: dict[str, Any] = dict(
            D_ptr=None if inputs.D is None else inputs.D.contiguous(),
            bias_ptr=None if bias is None else bias.contiguous(),
            ends_ptr=None,
            sums_ptr=None,
            directions=directions,
            batch=batch,
            length=length,
            groups=count,
            channels=channels,
            span=span,
            reverse=sum(back << k for k, back in enumerate(inputs.reverse)),
            zero=0,
            STATE=self.state,
            WHOLE=channels % block_d == 0,
            SOFTPLUS=inputs.delta_softplus,
            ZOH=inputs.b_disc == 'zoh',
            COMPLEX=complex_a,
            CHUNK=CHUNK,
        )
        for name in ('u', 'delta'):
            rows = _rows(getattr(inputs, name))
            self.arguments[f'{name}_ptr'] = rows
            self.arguments[f'{name}_strides'] = rows.stride()[:3]
        self.arguments['A_ptr'] = _as_real(inputs.A.to(self.wide))
        for name in 'BC':
            matrix = self._states(getattr(inputs, name), count)
            constant = matrix.dim() == CONSTANT_DIMS + complex_a
            strides = (0,) * 4 if constant else matrix.stride()[:4]
            self.arguments[f'{name}_ptr'] = matrix
            self.arguments[f'{name}_strides'] = strides
            self.arguments[f'CONSTANT_{name}'] = constant

    def _states(self, matrix: Tensor, groups: int) -> Tensor:
        """B or C with states side by side and a group axis of full size."""
        if self.wide.is_complex:
            matrix = matrix.to(self.wide).resolve_conj()
        if matrix.dim() == CONSTANT_DIMS:
            return _as_real(matrix)
        matrix = _rows(matrix).expand(-1, -1, -1, groups, -1)
        return torch.view_as_real(matrix) if self.wide.is_complex else matrix

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def empty_state(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def empty_parts(self, matrix: Tensor) -> Tensor:
        """Gradient of B or C: a part per channel block, or per sequence."""
        if matrix.dim() == CONSTANT_DIMS:
            return self.empty_state((*self.sums, self.state))
        return self.empty_state(self.parts)

    def split(self, kernel: Any) -> None:
        """If there are spans, find what each adds to the state after it."""
        if self.grid[1] == 1:
            return
        ends = self.empty_state((*self.sums, self.state))
        more = dict(ends_ptr=_as_real(ends), sums_ptr=self.empty(self.sums))
        self.launch(
            kernel,
            ENDS_OPTIONS,
            self.forward_tile,
            GROUP=self.forward_group,
            **more,
        )
        self.arguments |= more

    def launch(
        self, kernel: Any, options: dict[str, Any], tile: Tile, **more: Any
    ) -> None:
        """Run a kernel with those of the arguments that it has."""
        given = self.arguments | tile._asdict() | more
        arguments = {name: given[name] for name in kernel.arg_names}
        with torch.cuda.device_of(self.arguments['u_ptr']):
            kernel[self.grid](**arguments, **options)


def tiles(
    state: int, channels: int, complex_a: bool, b_disc: str = 'euler'
) -> tuple[Tile, Tile]:
    """Choose the tiles of both passes: the same numbers in each.

    Forward, a lane owns channels: only sums over states are needed. Backward,
    sums over states and over channels are, and a lane holds some of both:
    at 16 states 40 shuffles a token instead of 160. Complex tiles, and
    those of ``'zoh'``, have fewer numbers: their formulas keep more alive.
    """
    block_n = triton.next_power_of_2(state)
    per_channel = block_n * (4 if complex_a else 2 if b_disc == 'zoh' else 1)
    block_d = min(
        32, TILE_NUMEL // per_channel, triton.next_power_of_2(channels)
    )

    def tile(nl: int) -> Tile:
        dl = min(block_d, 32 // nl)
        return Tile(block_n // nl, nl, dl, block_d // dl)

    spare = min(block_n, 32 // block_d)
    return tile(spare), tile(max(spare, min(block_n, 4)))


def groups(b_disc: str) -> tuple[int, int]:
    """Choose the tokens in flight forward and backward: fewer for zoh."""
    return (1 if b_disc == 'zoh' else GROUP), GROUP


def span_length(programs: int, length: int) -> int:
    """Choose the tokens of a span, whole chunks, for enough programs."""
    spans = 1
    if programs < ENOUGH_PROGRAMS:
        wanted = triton.cdiv(2 * ENOUGH_PROGRAMS, max(programs, 1))
        spans = max(1, min(wanted, length // SHORTEST_SPAN))
    return int(triton.cdiv(triton.cdiv(length, spans), CHUNK)) * CHUNK


def _rows(x: Tensor) -> Tensor:
    """Numbers of a token side by side, and tokens within reach."""
    if x.stride(-1) == 1 and x.stride(2) < MAX_STEP:
        return x
    return x.contiguous()


def _as_real(x: Tensor) -> Tensor:
    """Contiguous memory, complex numbers as pairs."""
    x = x.resolve_conj().contiguous()
    return torch.view_as_real(x) if x.is_complex() else x


def _sum_parts(parts: Tensor, matrix: Tensor) -> Tensor:
    """Gradient of B or C in its shape."""
    if matrix.dim() == CONSTANT_DIMS:
        return parts.sum((0, 2))
    total = parts[0] if len(parts) == 1 else parts.sum(0)
    if total.shape == matrix.shape:
        return total
    return total.sum(3, keepdim=True)
