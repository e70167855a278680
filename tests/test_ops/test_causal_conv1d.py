"""The causal convolution, fused and plain, against its formula."""

import multiprocessing
import platform

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import (
    causal_conv1d,
    causal_conv1d_directions,
    native,
)
from mmstabvim.ops.causal_conv1d import (
    causal_conv1d_directions_ref,
    causal_conv1d_ref,
    fused,
)
from mmstabvim.ops.causal_conv1d.function import conv_flops

pytestmark = pytest.mark.usefixtures('one_thread')

EPS = torch.finfo(torch.float32).eps
NAMES = ('y', 'dx', 'dweight', 'dbias')


@pytest.fixture
def kernel(monkeypatch):
    """The fused path is there and on; skips where it cannot be built."""
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    if not fused.available():
        pytest.skip('no C++ compiler that can build the fused path')


def make_inputs(batch=2, length=13, dim=17, width=4, bias=True):
    """Inputs, float32, reproducible; x half of a wider tensor as in use."""
    generator = torch.Generator().manual_seed(1000 * length + 10 * dim + width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = normal(batch, length, 2 * dim)[..., :dim]
    return x, normal(dim, width), normal(dim) if bias else None


def run(conv, inputs, dtype=torch.float32, reverse=False, activation='silu'):
    """Output and the gradient of every input, by name."""
    leaves = [
        None if x is None else x.to(dtype).detach().requires_grad_()
        for x in inputs
    ]
    y = conv(*leaves, reverse, activation)
    generator = torch.Generator().manual_seed(1)
    # multiples of 1/8: exact in every dtype
    dy = torch.randn(y.shape, generator=generator).mul(8).round() / 8
    y.backward(dy.to(y.dtype))
    arrays = (y.detach(), *(None if x is None else x.grad for x in leaves))
    pairs = zip(NAMES, arrays, strict=True)
    return {name: array for name, array in pairs if array is not None}


def assert_close(actual, plain, exact, eps=EPS):
    """At most twice the error of plain PyTorch in the same dtype."""
    assert actual.keys() == exact.keys()
    terms = exact['y'][..., 0].numel()
    for name, wanted in exact.items():
        assert actual[name].dtype == plain[name].dtype
        error = (actual[name] - wanted).abs().max()
        scale = wanted.abs().max()
        if name in ('dweight', 'dbias'):  # sums that may cancel
            scale = scale.clamp(min=terms**0.5)
        bound = 2 * (plain[name] - wanted).abs().max() + 2 * eps * scale
        assert error <= bound, f'{name}: {error:.2e} > {bound:.2e}'


def assert_equal(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(actual[name], x), name


def check(inputs, **options):
    """Fused against plain PyTorch and against float64."""
    assert fused.supports(*inputs)
    actual = run(causal_conv1d, inputs, **options)
    plain = run(causal_conv1d_ref, inputs, **options)
    exact = run(causal_conv1d_ref, inputs, torch.float64, **options)
    assert_close(actual, plain, exact)


@pytest.mark.parametrize('conv', [causal_conv1d, causal_conv1d_ref])
@pytest.mark.parametrize('length', [1, 2, 3, 13])
@pytest.mark.parametrize('reverse', [False, True])
def test_by_hand(conv, length, reverse):
    """Each token is the weighted sum of itself and its past."""
    x, weight, bias = make_inputs(length=length, dim=3)
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
    check(make_inputs(length=length, dim=dim), reverse=reverse)


@pytest.mark.parametrize('width', range(1, 9))
@pytest.mark.parametrize('length', [3, 70])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('reverse', [False, True])
def test_widths_and_options(width, length, bias, activation, reverse, kernel):
    """Also wider than the sequence, and than what is left after a span."""
    inputs = make_inputs(length=length, width=width, bias=bias)
    check(inputs, activation=activation, reverse=reverse)


@pytest.mark.parametrize('axes', [(0,), (1,), (2,), (0, 1)], ids=str)
def test_strides(axes, kernel):
    """Of the input and of the output's gradient; weight and bias too."""
    steps = tuple(slice(None, None, 2 if i in axes else 1) for i in range(3))
    x = torch.randn(4, 20, 34)[steps]
    dy = torch.randn(4, 20, 34)[steps]
    dim = x.shape[2]
    inputs = (x, torch.randn(4, dim).t(), torch.randn(2 * dim)[::2])
    results = []
    for copy in (torch.clone, lambda x: x):
        layout = [copy(v).requires_grad_() for v in inputs]
        y = causal_conv1d(*layout, activation='silu')
        grads = torch.autograd.grad(y, layout, copy(dy))
        results.append(dict(zip(NAMES, (y, *grads), strict=True)))
    assert_equal(*results)


def test_expanded_gradient(kernel):
    """What ``sum`` hands back has no strides."""
    inputs = [v.requires_grad_() for v in make_inputs()]
    y = causal_conv1d(*inputs)
    grads = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    plain = torch.autograd.grad(y, inputs, torch.ones(y.shape))
    assert all(map(torch.equal, grads, plain))


def test_copies_no_strided_input(kernel):
    """A half of the input projection's output is read where it lies."""
    x = make_inputs()[0]
    assert fused._rows(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('reverse', [False, True])
def test_half_precision(dtype, reverse, kernel):
    """As if the inputs had been converted first; results rounded once."""
    inputs = [x.to(dtype) for x in make_inputs(length=65)]
    half = run(causal_conv1d, inputs, dtype, reverse)
    single = run(causal_conv1d, inputs, torch.float32, reverse)
    assert_equal(half, {k: x.to(dtype) for k, x in single.items()})
    plain = run(causal_conv1d_ref, inputs, dtype, reverse)
    exact = run(causal_conv1d_ref, inputs, torch.float64, reverse)
    assert_close(half, plain, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, kernel):
    """The inputs are rounded as for PyTorch's own convolution."""
    inputs = [v.requires_grad_() for v in make_inputs()]
    with torch.autocast('cpu', dtype):
        y = causal_conv1d(*inputs, activation='silu')
        wide = causal_conv1d(*(v.double() for v in inputs))
    assert y.dtype == dtype
    assert wide.dtype == torch.float64
    exact = causal_conv1d(*(v.to(dtype) for v in inputs), activation='silu')
    assert torch.equal(y, exact)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert [g.dtype for g in grads] == [torch.float32] * 3


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
    check(make_inputs(length=65, dim=21))
    check_silu()
    assert not messages
    assert len(list(empty_cache.glob('*.so'))) == 1


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('index', range(3))
@pytest.mark.parametrize('activation', [None, 'silu'])
def test_not_finite_stays_visible(index, value, activation, kernel):
    """Where the definition's results are not finite, so are these."""
    inputs = make_inputs()
    inputs[index].select(-1, 2).view(-1)[:1] = value
    actual = run(causal_conv1d, inputs, activation=activation)
    plain = run(causal_conv1d_ref, inputs, activation=activation)
    for name, wanted in plain.items():
        visible = ~wanted.isfinite()
        assert (~actual[name].isfinite())[visible].all(), name
    assert not actual['y'].isfinite().all()
    assert actual['y'][..., 3:].isfinite().all()  # other channels


@pytest.mark.parametrize('batch', [1, 5])
def test_same_bits(batch, kernel, two_threads):
    """From run to run and for every number of threads."""
    inputs = make_inputs(batch, length=197, dim=100)
    first = run(causal_conv1d, inputs)
    assert_equal(run(causal_conv1d, inputs), first)
    torch.set_num_threads(1)
    assert_equal(run(causal_conv1d, inputs), first)


UNSUPPORTED = {
    'float64': [x.double() for x in make_inputs()],
    'wide': make_inputs(width=9),
    'no batch': make_inputs(batch=0),
}


@pytest.mark.parametrize('case', UNSUPPORTED)
def test_leaves_the_rest_to_torch(case, kernel):
    inputs = UNSUPPORTED[case]
    assert not fused.supports(*inputs)
    dtype = inputs[0].dtype
    wanted = run(causal_conv1d_ref, inputs, dtype)
    assert_equal(run(causal_conv1d, inputs, dtype), wanted)


def test_environment_variable_turns_it_off(kernel, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, '0')
    monkeypatch.setattr(fused, '_built', None)
    wanted = run(causal_conv1d_ref, make_inputs())
    assert_equal(run(causal_conv1d, make_inputs()), wanted)


def test_falls_back(kernel, no_compiler, messages):
    """The same numbers without a compiler, and one line in the log."""
    wanted = run(causal_conv1d_ref, make_inputs())
    for _ in range(2):
        assert_equal(run(causal_conv1d, make_inputs()), wanted)
    assert len(messages) == 1
    assert messages[0].startswith('causal_conv1d runs without')


def _conv_in_child(inputs, wanted):
    y = causal_conv1d(*inputs)
    raise SystemExit(0 if torch.equal(y, wanted) else 3)


def test_runs_after_a_fork(kernel, two_threads):
    """The parent's OpenMP threads are missing in a forked child."""
    inputs = make_inputs(batch=4)
    wanted = causal_conv1d(*inputs)
    context = multiprocessing.get_context('fork')
    child = context.Process(target=_conv_in_child, args=(inputs, wanted))
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs
    assert child.exitcode == 0


@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.parametrize('reverse', [False, True])
def test_gradcheck_of_the_reference(activation, reverse):
    leaves = [
        x.double().requires_grad_() for x in make_inputs(length=5, dim=3)
    ]
    assert torch.autograd.gradcheck(
        lambda *x: causal_conv1d(*x, reverse, activation), leaves
    )


def make_directions(count=2, **options):
    """x once, weight and bias for each direction."""
    x, weight, bias = make_inputs(**options)
    generator = torch.Generator().manual_seed(2)
    scales = torch.randn(count, 1, 1, generator=generator)
    bias = None if bias is None else (scales[..., 0] * bias).requires_grad_()
    return x.requires_grad_(), (scales * weight).requires_grad_(), bias


def run_directions(conv, inputs, reverse, dtype=torch.float32):
    return run(
        lambda *leaves: conv(*leaves[:3], reverse, leaves[4]), inputs, dtype
    )


@pytest.mark.parametrize(
    'reverse', [(True,), (False, True), (True, False, False)], ids=str
)
@pytest.mark.parametrize('bias', [False, True])
def test_directions(reverse, bias, kernel, two_threads):
    """Each the bits of a call of its own; x has the sum of the gradients."""
    inputs = make_directions(len(reverse), length=70, bias=bias)
    actual = run_directions(causal_conv1d_directions, inputs, reverse)
    plain, exact = (
        run_directions(causal_conv1d_directions_ref, inputs, reverse, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert_close(actual, plain, exact)
    again = run_directions(causal_conv1d_directions, inputs, reverse)
    assert_equal(again, actual)
    for k, flag in enumerate(reverse):
        one = [None if v is None else v[k].detach() for v in inputs[1:]]
        y = causal_conv1d(inputs[0], *one, flag, 'silu')
        assert torch.equal(actual['y'][k], y)


def test_directions_share_one_gradient(kernel):
    """That of a merge: expanded over the directions, not copied."""
    inputs = make_directions()
    y = causal_conv1d_directions(*inputs)
    dy = torch.randn(y.shape[1:]).expand(y.shape)
    expanded = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    dense = torch.autograd.grad(y, inputs, dy.clone())
    assert all(map(torch.equal, expanded, dense))


@pytest.mark.parametrize('way', ['1', '0'], ids=['fused', 'plain'])
def test_directions_compile_in_one_graph(way, kernel, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, way)
    torch._dynamo.reset()
    compiled = torch.compile(
        causal_conv1d_directions, backend='aot_eager', fullgraph=True
    )
    inputs = make_directions()
    torch.testing.assert_close(
        run_directions(compiled, inputs, (False, True)),
        run_directions(causal_conv1d_directions, inputs, (False, True)),
    )


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_registered_with_pytorch(bias, dtype, kernel):
    """Schema, fake tensors and autograd registration are sound."""
    inputs = [
        None if x is None else x.to(dtype).detach().requires_grad_()
        for x in make_inputs(bias=bias)
    ]
    x, *parameters = inputs
    for reverse in ([1], [0, 1]):
        stacked = [
            None if v is None else v.expand(len(reverse), *v.shape)
            for v in parameters
        ]
        torch.library.opcheck(
            torch.ops.mmstabvim.causal_conv1d, (x, *stacked, reverse, 'silu')
        )


@pytest.mark.parametrize('way', ['1', '0'], ids=['fused', 'plain'])
def test_compiles_in_one_graph(way, kernel, monkeypatch):
    """``torch.compile`` sees one operator, or PyTorch's: no graph break."""
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, way)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d, backend=backend, fullgraph=True)
    y = compiled(*make_inputs(), activation='silu')
    assert ('mmstabvim.causal_conv1d' in graphs[0]) == (way == '1')
    wanted = causal_conv1d(*make_inputs(), activation='silu')
    torch.testing.assert_close(y, wanted)
    compiled = torch.compile(
        causal_conv1d, backend='aot_eager', fullgraph=True
    )
    torch.testing.assert_close(
        run(compiled, make_inputs()), run(causal_conv1d, make_inputs())
    )
    with torch.autocast('cpu', torch.bfloat16):
        assert compiled(*make_inputs()).dtype == torch.bfloat16


def count_flops(**options):
    with FlopCounterMode(display=False) as counter:
        y = causal_conv1d(
            *(x.requires_grad_() for x in make_inputs()), **options
        )
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return counter.get_total_flops(), backward.get_total_flops()


def test_flops_are_counted(kernel, monkeypatch):
    """Forward as PyTorch counts its own; backward by what is computed."""
    forward = conv_flops((2, 13, 17), (1, 17, 4))
    assert forward == 2 * 2 * 13 * 17 * 4
    assert count_flops() == (forward, 2 * forward)
    assert count_flops(activation='silu') == (forward, 3 * forward)
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, '0')
    assert count_flops()[0] == forward
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE)
    with FlopCounterMode(display=False) as counter:
        y = causal_conv1d_directions(*make_directions(), activation='silu')
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 4 * forward


class Convolve(nn.Module):
    def forward(self, x):
        return causal_conv1d(x, *make_inputs()[1:], activation='silu')


def test_complexity_info_does_not_depend_on_the_path(kernel, monkeypatch):
    counts = []
    for way in '10':
        monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, way)
        info = get_model_complexity_info(
            Convolve(), None, inputs=(make_inputs()[0],)
        )
        counts.append((info['flops'], info['activations']))
    assert counts[0] == counts[1] == (2 * 13 * 17 * 4, 2 * 13 * 17)


def test_checks_its_arguments():
    x, weight, bias = make_inputs()
    with pytest.raises(ValueError, match='weight'):
        causal_conv1d(x, weight.t())
    with pytest.raises(ValueError, match=r"one of .*'silu'.*, got 'relu'"):
        causal_conv1d(x, weight, bias, activation='relu')
    with pytest.raises(ValueError, match=r'bias must be \(17,\)'):
        causal_conv1d(x, weight, bias[1:])
    x, weight, bias = make_directions()
    with pytest.raises(ValueError, match=r'weight \(directions, dim'):
        causal_conv1d_directions(x, weight[0], bias)
    with pytest.raises(ValueError, match='one entry for each direction'):
        causal_conv1d_directions(x, weight, bias, (True,))
    with pytest.raises(ValueError, match=r'bias must be \(2, 17\)'):
        causal_conv1d_directions(x, weight, bias[0])
