"""The ``fused`` backend: one C++ kernel for each pass, ``fused.cpp``.

The same function as ``cpu.py``, with the same stored states.
"""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from mmstabvim.ops import native
from mmstabvim.ops.selective_scan import cpu
from mmstabvim.ops.selective_scan.cpu import borders_shape, output_dtype
from mmstabvim.ops.selective_scan.inputs import ScanInputs

__all__ = ['backward', 'borders_shape', 'forward', 'output_dtype', 'refusal']

SOURCE = Path(__file__).with_name('fused.cpp')
TASKS = 32
"""Tasks to split a direction into; fixed, so that sums do not depend on the
number of threads, nor a direction's results on the other directions."""

FLAT = 1e-20
"""Below this |A| the zero-order hold's weight is dt: |dt A| is below
float32's resolution for any step below 1e12."""


class _View(ctypes.Structure):
    """``View`` of fused.cpp: a tensor by its address and strides."""

    _fields_ = (
        ('data', ctypes.c_void_p),
        ('direction', ctypes.c_int64),
        ('batch', ctypes.c_int64),
        ('token', ctypes.c_int64),
        ('group', ctypes.c_int64),
    )


class _Scan(ctypes.Structure):
    """``Scan`` of fused.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                'directions',
                'batch',
                'length',
                'groups',
                'channels',
                'state',
                'chunk',
                'slabs',
                'threads',
                'complex',
                'hold',
                'softplus',
                'constant_b',
                'constant_c',
                'shared_b',
                'shared_c',
            )
        ),
        *((name, _View) for name in ('u', 'delta', 'B', 'C', 'y')),
        *(
            (name, ctypes.c_void_p)
            for name in (
                'A',
                'inverse',
                'flat',
                'D',
                'delta_bias',
                'reverse',
                'last',
                'borders',
            )
        ),
    )


class _Gradients(ctypes.Structure):
    """``Gradients`` of fused.cpp."""

    _fields_ = (
        *((name, _View) for name in ('dy', 'du', 'ddelta')),
        *(
            (name, ctypes.c_void_p)
            for name in (
                'dlast',
                'dB',
                'dC',
                'dB_parts',
                'dC_parts',
                'sums',
                'sums_batch',
            )
        ),
    )


def refusal() -> Exception | None:
    """Return the error to raise where the kernels cannot be built."""
    if _available():
        return None
    return RuntimeError(
        'the fused backend of selective_scan cannot run: its C++ kernels '
        'could not be built, the log says why'
    )


# torch.compile must not look inside: it knows no ctypes
@torch.compiler.assume_constant_result
def _available() -> bool:
    return library() is not None


def forward(
    inputs: ScanInputs, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`.cpu.forward`, which also stands in without a compiler.

    An exported graph may come to a machine without one.
    """
    if not _available():
        return cpu.forward(inputs, keep_states)
    call = _Call(inputs)
    directions, batch, _, dim = inputs.u.shape
    _, groups, state, channels = call.A.shape
    y = call.u.new_empty(inputs.u.shape)
    last = call.A.new_empty(directions, batch, groups, state, channels)
    borders = last.new_empty(borders_shape(inputs, keep_states))
    call.scan.y = _view(y, groups)
    call.scan.last = last.data_ptr()
    call.scan.borders = borders.data_ptr() if keep_states else None
    _built().mmstabvim_scan_forward(ctypes.byref(call.scan))
    return y, last.mT.reshape(directions, batch, dim, state), borders


def backward(
    dy: Tensor, dlast: Tensor | None, borders: Tensor, inputs: ScanInputs
) -> tuple[Tensor, ...]:
    """Compute :func:`.cpu.backward`, from ``borders`` of either variant."""
    if not _available():
        return cpu.backward(dy, dlast, borders, inputs)
    call = _Call(inputs)
    _, groups, _, channels = call.A.shape
    dy, borders = _rows(dy, torch.float32), _dense(borders)
    if dlast is not None:
        dlast = dlast.to(call.A.dtype).unflatten(2, (groups, channels))
        dlast = _dense(dlast.mT)
    du, ddelta = (call.u.new_empty(inputs.u.shape) for _ in range(2))
    parts_b, dB = call.matrix_buffers(inputs.B)
    parts_c, dC = call.matrix_buffers(inputs.C)
    sums = call.sums_buffer()
    sums_batch = call.sums_buffer(inputs.u.shape[1])
    gradients = _Gradients(
        _view(dy, groups),
        _view(du, groups),
        _view(ddelta, groups),
        _address(dlast),
        *map(_address, (dB, dC, parts_b, parts_c, sums, sums_batch)),
    )
    call.scan.borders = borders.data_ptr()
    _built().mmstabvim_scan_backward(
        ctypes.byref(call.scan), ctypes.byref(gradients)
    )
    dA, *constants, dD, dbias = call.split_sums(sums[:, 0])
    rest = iter(constants)
    dB = next(rest) if inputs.B.dim() == 3 else dB
    dC = next(rest) if inputs.C.dim() == 3 else dC
    if inputs.D is None:
        dD = dD.new_empty(0)
    if inputs.delta_bias is None:
        dbias = dbias.new_empty(0)
    return du, ddelta, dA, dB, dC, dD, dbias


class _Call:
    """Arguments common to both passes, and the tensors behind them."""

    def __init__(self, inputs: ScanInputs) -> None:
        directions, batch, length, dim = inputs.u.shape
        groups, state = inputs.groups, inputs.A.shape[2]
        channels = dim // groups
        wide = torch.complex64 if inputs.A.is_complex() else torch.float32
        self.u, self.delta = (
            _rows(x, torch.float32) for x in (inputs.u, inputs.delta)
        )
        self.A = _by_state(inputs.A.to(wide), groups)
        self.B, self.C = (
            _by_state(m.to(wide), groups) if m.dim() == 3 else _rows(m, wide)
            for m in (inputs.B, inputs.C)
        )
        self.D, self.delta_bias = (
            None if x is None else x.float().contiguous()
            for x in (inputs.D, inputs.delta_bias)
        )
        self.inverse: Tensor | None = None
        self.flat: Tensor | None = None
        if inputs.b_disc == 'zoh':
            self.inverse, self.flat = _inverse(self.A)
        if not wide.is_complex:
            self.A = self.A * math.log2(math.e)
        self.reverse = torch.tensor(inputs.reverse, dtype=torch.int64)
        blocks = -(-channels // 16)
        self.scan = _Scan(
            directions=directions,
            batch=batch,
            length=length,
            groups=groups,
            channels=channels,
            state=state,
            chunk=cpu.CHUNK,
            slabs=max(1, min(-(-TASKS // (batch * groups)), blocks)),
            threads=native.threads(),
            complex=wide.is_complex,
            hold=inputs.b_disc == 'zoh',
            softplus=inputs.delta_softplus,
            constant_b=inputs.B.dim() == 3,
            constant_c=inputs.C.dim() == 3,
            shared_b=_shared(inputs.B, groups),
            shared_c=_shared(inputs.C, groups),
            u=_view(self.u, groups),
            delta=_view(self.delta, groups),
            B=_matrix_view(self.B, groups),
            C=_matrix_view(self.C, groups),
            A=self.A.data_ptr(),
            inverse=_address(self.inverse),
            flat=_address(self.flat),
            D=_address(self.D),
            delta_bias=_address(self.delta_bias),
            reverse=self.reverse.data_ptr(),
        )

    def matrix_buffers(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of B or C: its parts, and the sum of the parts."""
        if matrix.dim() == 3:
            empty = self.A.new_empty(0)
            return empty, empty
        count = self.scan.slabs
        if _shared(matrix, self.scan.groups):
            count *= self.scan.groups
        parts = self.A.new_empty(count, *matrix.shape)
        return parts, parts[0] if count == 1 else torch.empty_like(parts[0])

    def sums_buffer(self, rows: int = 1) -> Tensor:
        """(directions, rows, groups, floats of all sums)."""
        scan = self.scan
        return self.u.new_empty(
            scan.directions, rows, scan.groups, sum(self._sums_sizes())
        )

    def split_sums(self, sums: Tensor) -> list[Tensor]:
        """dA, constant dB, constant dC, dD and ddelta_bias.

        Each in memory of its own: the outputs of an operator must not share
        memory.
        """
        *matrices, dD, dbias = sums.split(self._sums_sizes(), dim=-1)
        return [
            *(self._by_dim(x) for x in matrices),
            *(x.reshape(len(sums), -1).clone() for x in (dD, dbias)),
        ]

    def _sums_sizes(self) -> list[int]:
        scan = self.scan
        matrix = scan.state * scan.channels * (2 if scan.complex else 1)
        matrices = 1 + scan.constant_b + scan.constant_c
        return [matrix] * matrices + [scan.channels] * 2

    def _by_dim(self, x: Tensor) -> Tensor:
        """(directions, groups, floats) as (directions, dim, state)."""
        shape = (self.scan.state, self.scan.channels)
        if self.scan.complex:
            x = torch.view_as_complex(x.unflatten(-1, (*shape, 2)))
        else:
            x = x.unflatten(-1, shape)
        copy = x.mT.clone(memory_format=torch.contiguous_format)
        return copy.flatten(1, 2)


def _inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    """``1 / A``, 0 where A is 0 or nearly so; and where that is."""
    flat = A.abs() < FLAT
    double = torch.complex128 if A.is_complex() else torch.float64
    inverse = torch.where(flat, 1, A).to(double).reciprocal().to(A.dtype)
    return torch.where(flat, 0, inverse), flat.float()


def _shared(matrix: Tensor, groups: int) -> bool:
    """Tell if several groups use the same B or C."""
    return matrix.dim() == 5 and matrix.shape[3] < groups


def _dense(x: Tensor) -> Tensor:
    """Contiguous, without a pending conjugation or negation."""
    return x.resolve_conj().resolve_neg().contiguous()


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to ``dtype``, with a contiguous last axis.

    A tensor that all directions share is copied, if at all, once.
    """
    once = x[:1] if x.stride(0) == 0 else x
    once = once.to(dtype).resolve_conj().resolve_neg()
    if once.stride(-1) != 1:
        once = once.contiguous()
    return once.expand(x.shape)


def _by_state(matrix: Tensor, groups: int) -> Tensor:
    """(directions, dim, state) as (directions, groups, state, channels)."""
    return _dense(matrix.unflatten(1, (groups, -1)).mT)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _view(x: Tensor, groups: int) -> _View:
    """View of (directions, batch, length, dim)."""
    return _View(x.data_ptr(), *x.stride()[:3], x.shape[3] // groups)


def _matrix_view(x: Tensor, groups: int) -> _View:
    """View of B or C as in the scan, or constant, as :func:`_by_state`."""
    floats = 2 if x.is_complex() else 1
    if x.dim() == 4:
        direction, group = (floats * step for step in x.stride()[:2])
        return _View(x.data_ptr(), direction, 0, 0, group)
    *steps, group = (floats * step for step in x.stride()[:4])
    return _View(x.data_ptr(), *steps, 0 if _shared(x, groups) else group)


def _built() -> ctypes.CDLL:
    built = library()
    if built is None:
        raise RuntimeError('the fused scan is not available')
    return built


def library() -> ctypes.CDLL | None:
    """Return the compiled ``fused.cpp``, or None."""
    return native.load(SOURCE, 'selective_scan')
