"""Who decides on a backend, for every operator; shown without a GPU."""

import logging
import subprocess
import sys

import pytest
import torch
from operator_tester import TESTERS, convert
from torch._subclasses.fake_tensor import FakeTensorMode

from mmstabvim.layers.rms_norm import AddRMSNorm
from mmstabvim.ops import backend, native
from mmstabvim.ops.causal_conv1d import fused as fused_conv
from mmstabvim.ops.selective_scan import fused as fused_scan

GPU, CPU = torch.device('cuda', 0), torch.device('cpu')

every_operator = pytest.mark.parametrize('name', TESTERS)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    """Compiler and triton seem to be there; nothing was said before."""
    for variable in (
        backend.ENVIRONMENT_VARIABLE,
        native.ENVIRONMENT_VARIABLE,
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backend, 'has_triton', lambda: True)
    monkeypatch.setattr(backend, '_said', set())
    for module in (fused_conv, fused_scan):
        monkeypatch.setattr(module, '_available', lambda: True)


@pytest.fixture
def said(monkeypatch):
    """Lines of the log, with their levels."""
    lines = []
    monkeypatch.setattr(
        backend,
        'print_log',
        lambda line, level: lines.append((level, line)),
    )
    return lines


def ran(name, asked='auto', device='cpu', dtype=torch.float32):
    """The backend that an operator runs, without data."""
    tester = TESTERS[name]
    with FakeTensorMode():
        inputs = {
            k: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).to(
                device
            )
            for k, x in convert(tester.make(), dtype).items()
        }
        calls = tester.calls(inputs, asked)
    return calls[0][1][-1] if calls else 'reference'


def fastest(name, *wanted):
    """The first of the backends that an operator has."""
    return next(x for x in wanted if x in TESTERS[name].backends)


@every_operator
def test_device_decides(name):
    assert ran(name, device='cuda') == 'triton'
    assert ran(name) == fastest(name, 'fused', 'reference')


@every_operator
@pytest.mark.parametrize('asked', backend.BACKENDS)
def test_argument_decides(name, asked, monkeypatch):
    """Against the variable; what an operator lacks is an error."""
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, 'reference')
    device = 'cuda' if asked == 'triton' else 'cpu'
    if asked in TESTERS[name].backends:
        assert ran(name, asked, device) == asked
    else:
        has = ', '.join(TESTERS[name].backends)
        with pytest.raises(ValueError, match=f'no backend .*, it has {has}'):
            ran(name, asked, device)


@every_operator
@pytest.mark.parametrize('asked', backend.BACKENDS)
def test_variable_decides(name, asked, monkeypatch, said):
    """What an operator lacks becomes the next slower, said once."""
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, asked)
    device = 'cuda' if asked == 'triton' else 'cpu'
    lower = backend.BACKENDS[backend.BACKENDS.index(asked) :: -1]
    wanted = fastest(name, *lower)
    for _ in range(2):
        assert ran(name, device=device) == wanted
    ((level, line),) = said
    assert f'uses the {wanted!r} backend on {device}' in line
    assert (level == logging.WARNING) == (wanted != asked)
    assert (f'no backend {asked!r}' in line) == (wanted != asked)


@every_operator
def test_variable_gives_way_to_the_inputs(name, monkeypatch, said):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, 'triton')
    wanted = fastest(name, 'cpu', 'reference')
    assert ran(name, device='cuda', dtype=torch.float64) == wanted
    ((level, line),) = said
    assert level == logging.WARNING
    assert 'computes in float32, got torch.float64' in line


@every_operator
def test_float64_on_a_gpu(name, said):
    """An error where the rest is slow there; else said once, and plain."""
    if 'scan' in name:
        with pytest.raises(TypeError, match=r"float64; use backend='cpu'"):
            ran(name, device='cuda', dtype=torch.float64)
    else:
        for _ in range(2):
            found = ran(name, device='cuda', dtype=torch.float64)
            assert found == 'reference'
        assert [level for level, _ in said] == [logging.WARNING]


@every_operator
def test_gpu_without_triton(name, monkeypatch, said):
    """Never something slow unasked."""
    monkeypatch.setattr(backend, 'has_triton', lambda: False)
    with pytest.raises(RuntimeError, match='triton is not installed'):
        ran(name, 'triton', 'cuda')
    if 'scan' in name:
        with pytest.raises(RuntimeError, match='pip install triton'):
            ran(name, device='cuda')
        assert ran(name, 'cpu', 'cuda') == 'cpu'
        ((level, line),) = said
        assert 'slow on a GPU' in line
    else:
        for _ in range(2):
            assert ran(name, device='cuda') == 'reference'
        ((level, line),) = said
        assert 'triton is not installed' in line
    assert level == logging.WARNING


@every_operator
def test_triton_on_a_cpu(name, monkeypatch):
    """An error, but with the interpreter of the tests."""
    triton = pytest.importorskip('triton')
    monkeypatch.setattr(triton.knobs.runtime, 'interpret', False)
    with pytest.raises(RuntimeError, match='needs a GPU, got tensors on cpu'):
        ran(name, 'triton')
    monkeypatch.setattr(triton.knobs.runtime, 'interpret', True)
    assert ran(name, 'triton') == 'triton'


def test_fused_needs_a_cpu():
    with pytest.raises(RuntimeError, match='runs on a CPU, got tensors on cu'):
        ran('selective_scan', 'fused', 'cuda')


@every_operator
def test_cpp_turned_off(name, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, '0')
    assert ran(name) == fastest(name, 'cpu', 'reference')
    if 'fused' in TESTERS[name].backends:
        with pytest.raises(RuntimeError, match='MMSTABVIM_FUSED=0 turns it o'):
            ran(name, 'fused')


@every_operator
def test_names_are_checked(name, monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of.*'cuda'"):
        ran(name, 'cuda')
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, 'cud')
    with pytest.raises(ValueError, match='MMSTABVIM_BACKEND must be one of'):
        ran(name)
    assert ran(name, 'reference') == 'reference'


@pytest.mark.parametrize('asked', ['auto', *backend.BACKENDS])
def test_nearest_is_accepted(asked):
    """What a model passes on to its operators."""
    device = 'cuda' if asked == 'triton' else 'cpu'
    for name in ('selective_scan', 'causal_conv1d', 'gated_merge', 'rms_norm'):
        chosen = backend.nearest(name, asked)
        assert chosen == asked or chosen == ran(name, chosen, device)
    with pytest.raises(ValueError, match='backend must be one of'):
        backend.nearest('rms_norm', 'cuda')


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
        'selective_scan(x, x, torch.ones(3, 1), *torch.ones(2, 3, 1))\n'
        'print(any(name.endswith("kernels") for name in sys.modules))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ['False'], done.stderr
