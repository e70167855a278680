"""Fused C++ path of the ``cpu`` backend, compiled at first use.

``fused.cpp`` is built with the system's compiler into a per-user cache and
called through ctypes. Without a compiler, or with ``MMSTABVIM_FUSED=0``, the
PyTorch variant in ``cpu.py`` computes the same function.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmstabvim.ops.selective_scan.reference import num_groups

ENVIRONMENT_VARIABLE = 'MMSTABVIM_FUSED'
SOURCE = Path(__file__).with_name('fused.cpp')
COMPILERS = ('g++', 'clang++', 'c++')
FLAGS = (
    '-std=c++17',
    '-O3',
    '-march=native',
    '-fopenmp',
    '-shared',
    '-fPIC',
    '-ffp-contract=fast',
)
TASKS = 32
"""Tasks to split the work into; fixed, so that sums do not depend on the
number of threads."""

_DIGEST_SIZE = hashlib.sha256().digest_size
_IMPORTING_PROCESS = os.getpid()


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
        and os.environ.get(ENVIRONMENT_VARIABLE, '1') != '0'
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
            threads=_threads(),
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


def _threads() -> int:
    """PyTorch's setting, but 1 in a forked process.

    OpenMP's threads do not survive a fork; waiting for them would hang.
    """
    if os.getpid() != _IMPORTING_PROCESS:
        return 1
    return torch.get_num_threads()


def _built() -> ctypes.CDLL:
    built = library()
    if built is None:
        raise RuntimeError('the fused scan is not available')
    return built


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled ``fused.cpp``, or None; says once why not."""
    try:
        return _load_or_build()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        print_log(
            'selective_scan runs without its fused C++ path: '
            + ' '.join(str(error).split())[:300],
            logger='current',
            level=logging.INFO,
        )
        return None


def _load_or_build() -> ctypes.CDLL:
    compiler = _compiler()
    path = _library_path(compiler)
    if not _intact(path):
        _build(compiler, path)
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    """Command of the C++ compiler: CXX, or the first one found."""
    names = (os.environ.get('CXX') or '', *COMPILERS)
    for command in filter(None, map(shlex.split, names)):
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f'no C++ compiler (CXX, {", ".join(COMPILERS)})')


def _library_path(compiler: list[str]) -> Path:
    """Where the build is cached; the folder exists afterwards."""
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    folder = Path(base, 'mmstabvim')
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / f'fused_scan_{_key(compiler)}.so'


def _key(compiler: list[str]) -> str:
    """Hash of everything the machine code depends on."""
    version = subprocess.run(
        [*compiler, '--version'], capture_output=True, check=True, timeout=60
    ).stdout
    described = repr((compiler, FLAGS, _cpu_model())).encode()
    text = b'\n'.join((SOURCE.read_bytes(), version, described))
    return hashlib.sha256(text).hexdigest()[:16]


def _cpu_model() -> list[str]:
    """What ``-march=native`` looks at: machines may share a home folder."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    wanted = ('model name', 'flags', 'CPU part', 'Features')
    return [
        platform.machine(),
        platform.processor(),
        *sorted({line for line in lines if line.startswith(wanted)}),
    ]


def _intact(path: Path) -> bool:
    """Whether the file is there and ends in the digest of what precedes.

    Loading a truncated library could kill the process.
    """
    if not path.is_file():
        return False
    content = path.read_bytes()
    code, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
    return hashlib.sha256(code).digest() == digest


def _build(compiler: list[str], path: Path) -> None:
    """Compile beside ``path``, then rename: others may build it too."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder, path.name)
        done = subprocess.run(
            [*compiler, *FLAGS, str(SOURCE), '-o', str(output)],
            capture_output=True,
            text=True,
            errors='replace',
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f'{compiler[0]} failed: {done.stderr}')
        code = output.read_bytes()
        output.write_bytes(code + hashlib.sha256(code).digest())
        output.replace(path)
