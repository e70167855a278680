"""The causal convolution: its formula, its options, its C++ kernel."""

import multiprocessing
import platform

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from operator_tester import CONV, CONV_DIRECTIONS, assert_equal, convert
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import (
    causal_conv1d,
    causal_conv1d_directions,
    native,
)
from mmstabvim.ops.causal_conv1d import causal_conv1d_ref, fused
from mmstabvim.ops.causal_conv1d.function import conv_flops

pytestmark = pytest.mark.usefixtures('one_thread')

EPS = torch.finfo(torch.float32).eps
SILU = dict(activation='silu')
make_inputs = CONV.make


@pytest.fixture
def kernel(monkeypatch):
    """The fused path is there and on; skips where it cannot be built."""
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    if fused.library() is None:
        pytest.skip('no C++ compiler that can build the fused path')


@pytest.mark.parametrize('conv', [causal_conv1d, causal_conv1d_ref])
@pytest.mark.parametrize('length', [1, 2, 3, 13])
@pytest.mark.parametrize('reverse', [False, True])
def test_by_hand(conv, length, reverse):
    """Each token is the weighted sum of itself and its past."""
    x, weight, bias = make_inputs(length=length, dim=3).values()
    out = conv(x, weight, bias, reverse)
    sign = 1 if reverse else -1
    for t in range(length):
        exact = bias.clone().expand(2, 3)
        for k in range(4):
            if 0 <= t + sign * k < length:
                exact = exact + weight[:, 3 - k] * x[:, t + sign * k]
        torch.testing.assert_close(out[:, t], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('length', [1, 2, 3, 13, 64, 65, 197])
@pytest.mark.parametrize('dim', [1, 3, 16, 17, 100])
@pytest.mark.parametrize('reverse', [False, True])
def test_lengths_and_dims(length, dim, reverse, kernel):
    inputs = make_inputs(length=length, dim=dim)
    CONV.check(inputs, 'fused', reverse=reverse, **SILU)


@pytest.mark.parametrize('width', range(1, 9))
@pytest.mark.parametrize('length', [3, 70])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('reverse', [False, True])
def test_widths_and_options(width, length, bias, activation, reverse, kernel):
    """Also wider than the sequence, and than what is left after a span."""
    inputs = make_inputs(length=length, width=width, bias=bias)
    CONV.check(inputs, 'fused', activation=activation, reverse=reverse)


def test_copies_no_strided_input(kernel):
    """A half of the input projection's output is read where it lies."""
    x = make_inputs()['x']
    assert fused._rows(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('reverse', [False, True])
def test_half_precision(dtype, reverse, kernel):
    """As if the inputs had been converted first; results rounded once."""
    inputs = convert(make_inputs(length=65), dtype)
    options = dict(reverse=reverse, **SILU)
    half = CONV.run(inputs, 'fused', **options)
    single = CONV.run(inputs, 'fused', torch.float32, **options)
    assert_equal(half, {k: x.to(dtype) for k, x in single.items()})


def test_autocast_keeps_float64():
    with torch.autocast('cpu', torch.bfloat16):
        y = causal_conv1d(**convert(make_inputs(), torch.float64))
    assert y.dtype == torch.float64


def silu_and_slope(x):
    x = x[None, None].requires_grad_()
    y = causal_conv1d(x, torch.ones(x.shape[2], 1), activation='silu')
    y.sum().backward()
    return y.detach()[0, 0], x.grad[0, 0]


def check_silu():
    """Value to 4 roundings; the slope, which has a zero, to 4 of 1 + |x|."""
    x = torch.linspace(-86, 100, 100_003)
    y, slope = silu_and_slope(x)
    wide = x.double()
    exact = wide * torch.sigmoid(wide)
    assert ((y - exact).abs() <= 4 * EPS * exact.abs()).all()
    share = torch.sigmoid(wide)
    exact = share * (1 + wide * (1 - share))
    bound = 4 * EPS * share * (1 + wide.abs() * (1 - share))
    assert ((slope - exact).abs() <= bound).all()
    y, slope = silu_and_slope(torch.tensor([-1e30, -200.0, 0, 200, 1e30]))
    assert y.tolist() == [0, 0, 0, 200, torch.tensor(1e30).item()]
    assert slope.tolist() == [0, 0, 0.5, 1, 1]
    for value in (float('nan'), float('-inf')):
        y, slope = silu_and_slope(torch.tensor([value, 1.0]))
        assert y.isnan().tolist() == slope.isnan().tolist() == [True, False]


def test_silu_is_accurate(kernel):
    check_silu()


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='x86 flags')
@pytest.mark.parametrize('flag', ['-mno-avx512f', '-mno-avx'])
def test_other_vector_lengths(
    flag, kernel, monkeypatch, empty_cache, messages
):
    monkeypatch.setattr(native, 'FLAGS', (*native.FLAGS, flag))
    CONV.check(make_inputs(length=65, dim=21), 'fused', **SILU)
    check_silu()
    assert not messages
    assert len(list(empty_cache.glob('*.so'))) == 1


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('name', ['x', 'weight', 'bias'])
@pytest.mark.parametrize('activation', [None, 'silu'])
def test_not_finite_stays_visible(name, value, activation, kernel):
    """Where the definition's results are not finite, so are these."""
    inputs = make_inputs()
    inputs[name].select(-1, 2).view(-1)[:1] = value
    actual = CONV.run(inputs, 'fused', activation=activation)
    plain = CONV.run(inputs, activation=activation)
    for key, wanted in plain.items():
        visible = ~wanted.isfinite()
        assert (~actual[key].isfinite())[visible].all(), key
    assert not actual['y'].isfinite().all()
    assert actual['y'][..., 3:].isfinite().all()  # other channels


@pytest.mark.parametrize('batch', [1, 5])
def test_threads_change_no_bit(batch, kernel, two_threads):
    inputs = make_inputs(batch, length=197, dim=100)
    first = CONV.run(inputs, 'fused', **SILU)
    torch.set_num_threads(1)
    assert_equal(CONV.run(inputs, 'fused', **SILU), first)


UNSUPPORTED = {
    'float64': convert(make_inputs(), torch.float64),
    'two dtypes': make_inputs() | {'bias': make_inputs()['bias'].half()},
    'wide': make_inputs(width=9),
    'no batch': make_inputs(batch=0),
}


@pytest.mark.parametrize('case', UNSUPPORTED)
def test_kernel_refuses_what_it_cannot(case, kernel):
    """By name an error; left to itself, PyTorch's convolution."""
    inputs = UNSUPPORTED[case]
    with pytest.raises((TypeError, ValueError), match='the fused backend'):
        causal_conv1d(**inputs, backend='fused')
    if case != 'two dtypes':
        assert_equal(CONV.run(inputs, 'auto'), CONV.run(inputs))


def test_falls_back(kernel, no_compiler, messages):
    """The same numbers without a compiler, and one line in the log."""
    wanted = CONV.run(make_inputs())
    for _ in range(2):
        assert_equal(CONV.run(make_inputs(), 'auto'), wanted)
    assert len(messages) == 1
    assert messages[0].startswith('causal_conv1d runs without')
    with pytest.raises(RuntimeError, match='could not be built'):
        causal_conv1d(**make_inputs(), backend='fused')


def _conv_in_child(inputs, wanted):
    y = causal_conv1d(**inputs, backend='fused')
    raise SystemExit(0 if torch.equal(y, wanted) else 3)


def test_runs_after_a_fork(kernel, two_threads):
    """The parent's OpenMP threads are missing in a forked child."""
    inputs = make_inputs(batch=4)
    wanted = causal_conv1d(**inputs, backend='fused')
    context = multiprocessing.get_context('fork')
    child = context.Process(target=_conv_in_child, args=(inputs, wanted))
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs
    assert child.exitcode == 0


ORDERS = [(True,), (False, True), (True, False, False)]


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('reverse', ORDERS, ids=str)
def test_directions(reverse, bias, shared, kernel, two_threads):
    """Each the bits of a call of its own; a shared x sums the gradients."""
    inputs = CONV_DIRECTIONS.make(
        len(reverse), length=70, bias=bias, shared=shared
    )
    actual = CONV_DIRECTIONS.check(inputs, 'fused', reverse=reverse, **SILU)
    for k, flag in enumerate(reverse):
        one = {
            name: x if x is None or (shared and name == 'x') else x[k]
            for name, x in inputs.items()
        }
        y = causal_conv1d(**one, reverse=flag, backend='fused', **SILU)
        assert torch.equal(actual['y'][k], y)


@pytest.mark.parametrize('backend', ['reference', 'fused'])
def test_one_x_for_each_direction(backend, kernel):
    """What copies of a shared x would give."""
    inputs = CONV_DIRECTIONS.make()
    copies = inputs | {'x': inputs['x'].expand(2, -1, -1, -1)}
    once, each = (
        CONV_DIRECTIONS.run(given, backend) for given in (inputs, copies)
    )
    assert torch.equal(once['y'], each['y'])
    assert torch.equal(once['dweight'], each['dweight'])
    torch.testing.assert_close(once['dx'], each['dx'].sum(0))


def count_flops(function, inputs, **options):
    given = {k: x.requires_grad_() for k, x in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        y = function(**given, **options)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return counter.get_total_flops(), backward.get_total_flops()


def test_flops_are_counted(kernel):
    """Forward as PyTorch counts its own; backward by what is computed."""
    x, weight, _ = make_inputs().values()
    forward = conv_flops(x, weight[None])
    assert forward == 2 * 2 * 13 * 17 * 4

    def count(**options):
        return count_flops(causal_conv1d, make_inputs(), **options)

    assert count(backend='fused') == (forward, 2 * forward)
    assert count(backend='fused', **SILU) == (forward, 3 * forward)
    assert count(backend='reference')[0] == forward
    for shared in (True, False):
        inputs = CONV_DIRECTIONS.make(shared=shared)
        found = count_flops(causal_conv1d_directions, inputs, **SILU)
        assert found == (2 * forward, 6 * forward)


class Convolve(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.options = dict(backend=backend, **SILU)

    def forward(self, x):
        return causal_conv1d(**make_inputs() | {'x': x}, **self.options)


def test_complexity_info_does_not_depend_on_the_backend(kernel):
    for backend in ('reference', 'fused'):
        info = get_model_complexity_info(
            Convolve(backend), None, inputs=(make_inputs()['x'],)
        )
        assert info['flops'] == 2 * 13 * 17 * 4
        assert info['activations'] == 2 * 13 * 17


def test_checks_its_arguments():
    x, weight, bias = make_inputs().values()
    with pytest.raises(ValueError, match='weight'):
        causal_conv1d(x, weight.t())
    with pytest.raises(ValueError, match=r"one of .*'silu'.*, got 'relu'"):
        causal_conv1d(x, weight, bias, activation='relu')
    with pytest.raises(ValueError, match=r'bias must be \(17,\)'):
        causal_conv1d(x, weight, bias[1:])
    x, weight, bias = CONV_DIRECTIONS.make().values()
    with pytest.raises(ValueError, match=r'weight \(directions, dim'):
        causal_conv1d_directions(x, weight[0], bias)
    with pytest.raises(ValueError, match='one entry for each direction'):
        causal_conv1d_directions(x, weight, bias, (True,))
    with pytest.raises(ValueError, match=r'bias must be \(2, 17\)'):
        causal_conv1d_directions(x, weight, bias[0])
    with pytest.raises(ValueError, match=r'or \(directions, batch'):
        causal_conv1d_directions(x.expand(3, -1, -1, -1), weight, bias)
