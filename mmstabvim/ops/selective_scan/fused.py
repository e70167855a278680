"""Fused C++ path of the ``cpu`` backend, ``fused.cpp``.

Where it is not available the PyTorch variant in ``cpu.py`` computes the same
function.
"""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from mmstabvim.ops import native
from mmstabvim.ops.selective_scan.reference import num_groups

SOURCE = Path(__file__).with_name('fused.cpp')
TASKS = 32
"""Tasks to split the work into; fixed, so that sums do not depend on the
number of threads."""


class _View(ctypes.Structure):
    """``View`` of fused.cpp: a tensor by its address and strides."""

    _fields_ = (
        ('data', ctypes.c_void_p),
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
                'batch',
                'length',
                'groups',
                'channels',
                'state',
                'chunk',
                'slabs',
                'threads',
                'softplus',
                'reverse',
                'constant_b',
                'constant_c',
            )
        ),
        *((name, _View) for name in ('u', 'delta', 'B', 'C', 'y')),
        *(
            (name, ctypes.c_void_p)
            for name in ('A', 'D', 'delta_bias', 'last', 'borders')
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
                'dB_slabs',
                'dC_slabs',
                'sums',
                'sums_batch',
            )
        ),
    )


def supports(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    b_disc: str,
) -> bool:
    """Whether the fused path can run these inputs here.

    It needs CPU tensors, a real float32 state, ``b_disc='euler'``, equal
    groups in B and C, and a compiler. Arguments as in :func:`.cpu.forward`.
    """
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    given = [x for x in (u, delta, A, B, C, D, delta_bias) if x is not None]
    return (
        b_disc == 'euler'
        and all(x.device.type == 'cpu' for x in given)
        and all(x.dtype in narrow for x in given)
        and len({m.shape[2] for m in (B, C) if m.dim() == 4}) <= 1
        and native.enabled()
        and library() is not None
    )


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
    keep_states: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.cpu.forward`, with a state kept every ``chunk`` tokens."""
    call = _Call(
        u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, chunk
    )
    batch, length, dim = u.shape
    chunks = -(-length // chunk) if keep_states else 0
    groups, state, channels = call.A.shape
    y = call.u.new_empty(u.shape)
    last = y.new_empty(batch, groups, state, channels)
    borders = y.new_empty(chunks, *last.shape)
    call.scan.y = _view(y, groups)
    call.scan.last = last.data_ptr()
    call.scan.borders = borders.data_ptr() if keep_states else None
    _built().mmstabvim_scan_forward(ctypes.byref(call.scan))
    return y, last.mT.reshape(batch, dim, state), borders


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
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`.cpu.backward`, from ``borders`` of either variant."""
    call = _Call(
        u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, chunk
    )
    groups, state, channels = call.A.shape
    dy, borders = _rows(dy), borders.contiguous()
    if dlast is not None:
        dlast = dlast.float().unflatten(1, (groups, channels)).mT.contiguous()
    du, ddelta = dy.new_empty(u.shape), dy.new_empty(u.shape)
    slabs_b, dB = call.matrix_buffers(B)
    slabs_c, dC = call.matrix_buffers(C)
    rows = [state] + [state for m in (B, C) if m.dim() == 2] + [1, 1]
    sums = dy.new_empty(groups, sum(rows), channels)
    sums_batch = dy.new_empty(u.shape[0], *sums.shape)
    gradients = _Gradients(
        _view(dy, groups),
        _view(du, groups),
        _view(ddelta, groups),
        _address(dlast),
        *map(_address, (dB, dC, slabs_b, slabs_c, sums, sums_batch)),
    )
    call.scan.borders = borders.data_ptr()
    _built().mmstabvim_scan_backward(
        ctypes.byref(call.scan), ctypes.byref(gradients)
    )
    parts = iter([_by_dim(part) for part in sums.split(rows, dim=1)])
    dA = next(parts)
    dB = next(parts) if B.dim() == 2 else dB
    dC = next(parts) if C.dim() == 2 else dC
    dD, dbias = (part.squeeze(1) for part in parts)
    if D is None:
        dD = dD.new_empty(0)
    if delta_bias is None:
        dbias = dbias.new_empty(0)
    return du, ddelta, dA, dB, dC, dD, dbias


class _Call:
    """Arguments common to both passes, and the tensors behind them."""

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
        chunk: int,
    ) -> None:
        batch, length, dim = u.shape
        groups = num_groups(B, C)
        self.u, self.delta = _rows(u), _rows(delta)
        self.A = _by_state(A.float() * math.log2(math.e), groups)
        self.B, self.C = (
            _by_state(m.float(), groups) if m.dim() == 2 else _rows(m)
            for m in (B, C)
        )
        self.D, self.delta_bias = (
            None if x is None else x.float().contiguous()
            for x in (D, delta_bias)
        )
        self.scan = _Scan(
            batch=batch,
            length=length,
            groups=groups,
            channels=dim // groups,
            state=A.shape[1],
            chunk=chunk,
            slabs=max(1, min(-(-TASKS // (batch * groups)), -(-dim // 16))),
            threads=native.threads(),
            softplus=delta_softplus,
            reverse=reverse,
            constant_b=B.dim() == 2,
            constant_c=C.dim() == 2,
            u=_view(self.u, groups),
            delta=_view(self.delta, groups),
            B=_matrix_view(self.B),
            C=_matrix_view(self.C),
            A=self.A.data_ptr(),
            D=_address(self.D),
            delta_bias=_address(self.delta_bias),
        )

    def matrix_buffers(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of B or C: a part per slab, and the sum of the parts."""
        if matrix.dim() == 2:
            empty = self.u.new_empty(0)
            return empty, empty
        parts = self.u.new_empty(self.scan.slabs, *matrix.shape)
        one = self.scan.slabs == 1
        return parts, parts[0] if one else torch.empty_like(parts[0])


def _rows(x: Tensor) -> Tensor:
    """Float32 with a contiguous last axis."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _by_state(matrix: Tensor, groups: int) -> Tensor:
    """(dim, state) as (groups, state, channels)."""
    return matrix.unflatten(0, (groups, -1)).mT.contiguous()


def _by_dim(matrix: Tensor) -> Tensor:
    """(groups, state, channels) as (dim, state), in memory of its own.

    The outputs of an operator must not share memory.
    """
    copy = matrix.mT.clone(memory_format=torch.contiguous_format)
    return copy.flatten(0, 1)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _view(x: Tensor, groups: int) -> _View:
    """Of (batch, length, dim)."""
    channels = x.shape[2] // groups
    return _View(x.data_ptr(), x.stride(0), x.stride(1), channels)


def _matrix_view(x: Tensor) -> _View:
    """Of B or C as in the scan, or constant (groups, state, channels)."""
    if x.dim() == 3:
        return _View(x.data_ptr(), 0, 0, x.stride(0))
    return _View(x.data_ptr(), *x.stride()[:3])


def _built() -> ctypes.CDLL:
    built = library()
    if built is None:
        raise RuntimeError('the fused scan is not available')
    return built


def library() -> ctypes.CDLL | None:
    """The compiled ``fused.cpp``, or None."""
    return native.load(SOURCE, 'selective_scan')
