"""Which way the operators around the scan take, shown without a GPU."""

import functools
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmstabvim.layers.rms_norm import AddRMSNorm
from mmstabvim.ops import (
    add_rms_norm,
    backend,
    causal_conv1d,
    causal_conv1d_directions,
    gated_merge,
    rms_norm,
)

GPU, CPU = torch.device('cuda', 0), torch.device('cpu')


@pytest.fixture(autouse=True)
def triton_found(monkeypatch):
    """Triton seems to be there, and no backend is forced."""
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backend, 'has_triton', lambda: True)


def test_triton_on_a_gpu_only():
    assert backend.use_triton(GPU)
    assert not backend.use_triton(CPU)
    assert not backend.use_triton(torch.device('meta'))


@pytest.mark.parametrize(
    ('value', 'wanted'),
    [('reference', False), ('cpu', False), ('triton', True), ('auto', True)],
)
def test_environment_variable(value, wanted, monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, value)
    assert backend.use_triton(GPU) == wanted
    assert not backend.use_triton(CPU)


def test_says_once_that_triton_is_missing(monkeypatch):
    monkeypatch.undo()
    lines = []
    monkeypatch.setattr(backend, 'print_log', lambda x, **_: lines.append(x))
    monkeypatch.setattr(backend.importlib.util, 'find_spec', lambda _: None)
    for cached in (backend.has_triton, backend._warn_without_triton):
        cached.cache_clear()
    assert not backend.use_triton(CPU)
    assert not lines
    for _ in range(2):
        assert not backend.use_triton(GPU)
    for cached in (backend.has_triton, backend._warn_without_triton):
        cached.cache_clear()
    assert len(lines) == 1
    assert lines[0].startswith('triton is not installed')


def make_inputs(dtype=torch.float32):
    """Tensors of no data that say they are on a GPU."""
    empty = functools.partial(torch.empty, dtype=dtype, device=GPU)
    return empty(2, 5, 12)[..., :6], empty(2, 2, 5, 6), empty(2, 6, 4)


def names(function, *inputs):
    """The project's operators that a call runs."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Record():
        function(*inputs)
    return [name for name in seen if name.startswith('mmstabvim::')]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_tensors_on_a_gpu_take_the_kernels(dtype):
    """Shapes and dtypes of the results too; nothing runs."""
    with FakeTensorMode():
        x, y, weight = make_inputs(dtype)
        calls = {
            'causal_conv1d': (causal_conv1d_directions, x, weight),
            'gated_merge': (gated_merge, y, x),
            'add_rms_norm': (add_rms_norm, x, x.float(), weight[0, :, 0]),
        }
        for name, call in calls.items():
            assert names(*call) == [f'mmstabvim::{name}']
        u = causal_conv1d_directions(x, weight)
        assert (u.shape, u.dtype, u.device) == ((2, 2, 5, 6), dtype, GPU)
        assert causal_conv1d(x, weight[0]).shape == (2, 5, 6)
        normed, stream = add_rms_norm(x, None, weight[0, :, 0])
        assert (normed.dtype, stream.dtype) == (dtype, torch.float32)
        assert normed.shape == stream.shape == x.shape
        assert rms_norm(x, weight[0, :, 0]).dtype == dtype


@pytest.mark.parametrize('forced', [False, True])
def test_what_the_kernels_refuse_is_plain(forced, monkeypatch):
    """float64, or everything if the environment says so."""
    if forced:
        monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, 'reference')
    dtype = torch.float32 if forced else torch.float64
    with FakeTensorMode():
        x, y, weight = make_inputs(dtype)
        assert not names(causal_conv1d_directions, x, weight)
        assert not names(gated_merge, y, x)
        assert not names(add_rms_norm, x, None, weight[0, :, 0])


def test_block_norm_takes_the_dtype_of_autocast_on_a_gpu(monkeypatch):
    """What the next linear layer would convert to; never float64."""
    monkeypatch.setattr(
        'mmstabvim.layers.rms_norm.autocast_dtype', lambda _: torch.bfloat16
    )
    with FakeTensorMode():
        hidden = torch.empty(2, 5, 6, device=GPU)
        with torch.device(GPU):
            norm, wide = AddRMSNorm(6), AddRMSNorm(6)
            wide.weight = torch.nn.Parameter(wide.weight.double())
        normed, stream = norm(hidden, hidden)
        assert (normed.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
        assert wide(hidden.double())[0].dtype == torch.float64
        on_cpu, _ = AddRMSNorm(6)(torch.empty(2, 5, 6))
        assert on_cpu.dtype == torch.float32


def test_autocast_dtype():
    assert backend.autocast_dtype(CPU) is None
    assert backend.autocast_dtype(torch.device('meta')) is None
    with torch.autocast('cpu', torch.float16):
        assert backend.autocast_dtype(CPU) == torch.float16
        assert backend.autocast_dtype(GPU) is None


def test_triton_is_imported_on_a_gpu_only():
    code = (
        'import sys, torch\n'
        'from mmstabvim.ops import *\n'
        'x = torch.ones(1, 3, 2)\n'
        'gated_merge(causal_conv1d_directions(x, torch.ones(2, 2, 4)), x)\n'
        'add_rms_norm(x, x, torch.ones(2))\n'
        'print("mmstabvim.ops.gated_merge.kernels" in sys.modules)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.stdout == 'False\n', done.stderr
