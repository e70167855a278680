"""Fused C++ path on a CPU, ``fused.cpp``: convolution and SiLU in one."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmstabvim.ops import native

SOURCE = Path(__file__).with_name('fused.cpp')
MAX_WIDTH = 8
"""Widths that ``fused.cpp`` is compiled for: 1 to this one."""

SPAN = 64
"""Most tokens of a task; fixed, so that sums do not depend on the number of
threads."""

SHARED = 3
"""Axes of an x that all directions share: (batch, length, dim)."""


class _View(ctypes.Structure):
    """``View`` of fused.cpp: a tensor by its address and strides."""

    _fields_ = (
        ('data', ctypes.c_void_p),
        ('batch', ctypes.c_int64),
        ('token', ctypes.c_int64),
    )


class _Conv(ctypes.Structure):
    """``Conv`` of fused.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                'batch',
                'length',
                'dim',
                'width',
                'spans',
                'threads',
                'reverse',
                'silu',
                'accumulate',
            )
        ),
        *((name, _View) for name in ('x', 'y', 'dy', 'dx')),
        *(
            (name, ctypes.c_void_p)
            for name in ('taps', 'bias', 'parts', 'dweight', 'dbias')
        ),
    )


def refusal() -> Exception | None:
    """Return the error to raise where the kernel cannot be built."""
    if _available():
        return None
    return RuntimeError(
        'the fused backend of causal_conv1d cannot run: its C++ kernel could '
        'not be built, the log says why'
    )


# torch.compile must not look inside: it knows no ctypes
@torch.compiler.assume_constant_result
def _available() -> bool:
    return library() is not None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: Sequence[bool],
    activation: str | None,
) -> Tensor:
    """Compute :func:`.reference.causal_conv1d_directions_ref`."""
    x, taps, biases = _rows(x), _taps(weight), _biases(bias)
    y = x.new_empty((len(reverse), *x.shape[-3:]))
    for k, flag in enumerate(reverse):
        own = x if x.dim() == SHARED else x[k]
        conv = _arguments(
            own, taps, biases, k, flag, activation, y=_view(y[k])
        )
        _built().mmstabvim_conv_forward(ctypes.byref(conv))
    return y.to(weight.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: Sequence[bool],
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, weight and bias (any, if it is absent)."""
    x, taps, biases = _rows(x), _taps(weight), _biases(bias)
    dx = x.new_empty(x.shape)
    dweight = dx.new_empty(weight.shape)
    dbias = dx.new_empty(weight.shape[:2])
    _, width, dim = taps.shape
    parts = dx.new_empty(x.shape[-3], _spans(x), width + 1, dim)
    for k, flag in enumerate(reverse):
        rows, shared = _rows(dy[k]), x.dim() == SHARED
        conv = _arguments(
            x if shared else x[k],
            taps,
            biases,
            k,
            flag,
            activation,
            accumulate=shared and k > 0,
            dy=_view(rows),
            dx=_view(dx if shared else dx[k]),
            parts=parts.data_ptr(),
            dweight=dweight[k].data_ptr(),
            dbias=dbias[k].data_ptr(),
        )
        _built().mmstabvim_conv_backward(ctypes.byref(conv))
    dtype = weight.dtype
    return dx.to(dtype), dweight.to(dtype), dbias.to(dtype)


def _arguments(
    x: Tensor,
    taps: Tensor,
    biases: Tensor | None,
    direction: int,
    reverse: bool,
    activation: str | None,
    **others: Any,
) -> _Conv:
    """Arguments of both passes; the tensors must outlive the call."""
    batch, length, dim = x.shape
    return _Conv(
        batch=batch,
        length=length,
        dim=dim,
        width=taps.shape[1],
        spans=_spans(x),
        threads=native.threads(),
        reverse=reverse,
        silu=activation == 'silu',
        x=_view(x),
        taps=taps[direction].data_ptr(),
        bias=None if biases is None else biases[direction].data_ptr(),
        **others,
    )


def _spans(x: Tensor) -> int:
    return -(-x.shape[-2] // SPAN)


def _rows(x: Tensor) -> Tensor:
    """Float32 with a contiguous last axis."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _taps(weight: Tensor) -> Tensor:
    return weight.float().mT.contiguous()  # (directions, width, dim)


def _biases(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _view(x: Tensor) -> _View:
    return _View(x.data_ptr(), x.stride(0), x.stride(1))


def _built() -> ctypes.CDLL:
    built = library()
    if built is None:
        raise RuntimeError('the fused convolution is not available')
    return built


def library() -> ctypes.CDLL | None:
    """Return the compiled ``fused.cpp``, or None."""
    return native.load(SOURCE, 'causal_conv1d')
