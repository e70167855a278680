"""Triton's causal convolution against the plain one, in float64."""

import functools
import json
import sys

import pytest
import torch
from kernel_checks import (
    assert_close,
    assert_compiled,
    assert_equal,
    compile_kernel,
    compiled_apart,
    copied,
    on_gpu,
    sparse,
)

from mmstabvim.ops import causal_conv1d, causal_conv1d_directions
from mmstabvim.ops.causal_conv1d import causal_conv1d_directions_ref

triton = pytest.importorskip('triton')

from mmstabvim.ops.causal_conv1d import kernels  # noqa: E402
from mmstabvim.ops.causal_conv1d import triton as backend  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
NAMES = ('y', 'dx', 'dweight', 'dbias')
BOTH = (False, True)

REGISTERS = {
    'fwd bf16 80': 96,
    'fwd bf16 90': 96,
    'fwd bf16 100': 96,
    'bwd bf16 80': 96,
    'bwd bf16 90': 96,
    'bwd bf16 100': 96,
    'bwd fp32 90': 96,
}
"""Of each lane, two directions of width 4 with SiLU, by inputs."""


def make_inputs(batch=2, length=13, dim=17, width=4, directions=2, bias=True):
    """Inputs, float32, reproducible; x half of a wider tensor as in use."""
    generator = torch.Generator().manual_seed(1000 * length + 10 * dim + width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    x = normal(batch, length, 2 * dim)[..., :dim]
    weight = normal(directions, dim, width)
    return x, weight, normal(directions, dim) if bias else None


def make_gradient(y):
    """Of the output; multiples of 1/8 are exact in every dtype."""
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).mul(8).round() / 8
    return dy.to(y)


def named(y, grads, bias):
    """Without the gradient of an absent bias, which may be anything."""
    arrays = (y.detach(), *grads)[: 4 if bias is not None else 3]
    return dict(zip(NAMES, arrays, strict=False))


def run(inputs, reverse=BOTH, activation='silu', dy=None):
    """Output and gradients of the kernels."""
    y = backend.forward(*inputs, reverse, activation)
    dy = make_gradient(y) if dy is None else dy
    grads = backend.backward(dy, *inputs, reverse, activation)
    return named(y, grads, inputs[2])


def run_plain(inputs, dtype, reverse=BOTH, activation='silu', dy=None):
    """The same by autograd from PyTorch's convolution in some dtype."""
    leaves = [
        None if x is None else x.to(dtype).detach().requires_grad_()
        for x in inputs
    ]
    y = causal_conv1d_directions_ref(*leaves, reverse, activation)
    dy = make_gradient(y) if dy is None else dy
    present = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(y, present, dy.to(dtype))
    return named(y, grads, inputs[2])


def assert_accurate(actual, plain, exact):
    eps = torch.finfo(plain['y'].dtype).eps
    terms = exact['y'][0, ..., 0].numel()
    assert_close(actual, plain, exact, eps, ('dweight', 'dbias'), terms)


def check(inputs, **options):
    """Kernels against plain PyTorch and against float64."""
    dtype = inputs[0].dtype
    plain = run_plain(inputs, dtype, **options)
    exact = run_plain(inputs, torch.float64, **options)
    assert_accurate(run(inputs, **options), plain, exact)


@pytest.mark.parametrize('length', [1, 2, 13, 63, 64, 65, 197])
def test_lengths(length):
    check(make_inputs(batch=1, length=length, dim=3))


def test_long_spans(monkeypatch):
    """Those of a large batch; the last one has tokens to spare."""
    monkeypatch.setattr(backend, 'ENOUGH_PROGRAMS', 1)
    assert backend.tiling(1, 197, 3) == (1, 50)
    assert backend.tiling(1, 261, 3) == (2, 33)
    monkeypatch.setattr(backend, 'SPANS', (13,))
    assert backend.tiling(1, 69, 3) == (2, 9)
    check(make_inputs(batch=1, length=69, dim=3))


@pytest.mark.parametrize('dim', [1, 63, 65, 129])
def test_dims(dim):
    """Around the blocks of channels of both passes."""
    check(make_inputs(batch=1, length=2, dim=dim))


@pytest.mark.parametrize('width', range(1, 9))
@pytest.mark.parametrize('length', [3, 19])
def test_widths(width, length):
    """Also wider than the sequence, and than a span."""
    check(make_inputs(1, length, 3, width))


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('activation', [None, 'silu'])
def test_options(bias, activation):
    check(make_inputs(1, 9, 3, bias=bias), activation=activation)


@pytest.mark.parametrize(
    'reverse',
    [(False,), (True,), (True, False), (True, True, False)],
    ids=str,
)
def test_orders(reverse):
    check(make_inputs(1, 9, 3, directions=len(reverse)), reverse=reverse)


def test_every_token_has_a_span():
    for length in range(1, 600):
        for batch in (1, 700):
            blocks, span = backend.tiling(batch, length, 5)
            rows = blocks * backend.BLOCK_R
            assert rows * span >= length > (blocks - 1) * backend.BLOCK_R
            assert span <= max(backend.SPANS)
            assert span == 1 or rows * (span - 1) < length


@pytest.mark.parametrize('axes', [(0,), (1,), (2,), (0, 1)], ids=str)
def test_strides(axes):
    """Of the input and of the output's gradient; weight and bias too."""
    steps = tuple(slice(None, None, 2 if i in axes else 1) for i in range(3))
    x = make_inputs(2, 10, 6)[0].contiguous()[steps]
    batch, length, dim = x.shape
    weight = make_inputs(dim=dim)[1].mT.contiguous().mT
    bias = make_inputs(dim=2 * dim)[2][:, ::2]
    double = (2, batch, length, 2, dim)
    dy = make_gradient(x.new_empty(double))[:, :, :, 0]
    strided = run((x, weight, bias), dy=dy)
    dense = run([copied(v) for v in (x, weight, bias)], dy=copied(dy))
    assert not dy.is_contiguous()
    assert_equal(strided, dense)


def test_expanded_gradient():
    """What the gated merge hands back: one gradient for all directions."""
    inputs = make_inputs()
    dy = make_gradient(inputs[0]).expand(2, -1, -1, -1)
    assert_equal(run(inputs, dy=dy), run(inputs, dy=copied(dy)))


def test_copies_no_strided_input():
    """A half of the input projection's output is read where it lies."""
    x = make_inputs()[0]
    assert not x.is_contiguous()
    assert backend._rows(x) is x


@pytest.mark.skipif(DEVICE == 'cuda', reason='needs memory that is not there')
@pytest.mark.parametrize('strides', [(9, 2**30, 1), (2**30, 3, 1)], ids=str)
def test_offsets_beyond_32_bits(strides):
    """Addresses in tensors of more than 2**31 elements."""
    order = (False, True, False)
    near = [v.half() for v in make_inputs(3, 3, 3, directions=3)]
    x = sparse((3, 3, 3), strides).copy_(near[0])
    dy = sparse((3, 3, 3, 3), (2**30 + 27, *strides))
    dy.copy_(make_gradient(dy))
    wanted = run(near, order, dy=copied(dy))
    assert_equal(run((x, *near[1:]), order, dy=dy), wanted)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """As if the inputs had been converted first; results rounded once."""
    inputs = [x.to(dtype) for x in make_inputs(1, length=21, dim=3)]
    check(inputs)
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        return  # where the interpreter cuts digits off
    single = run([x.float() for x in inputs])
    assert_equal(run(inputs), {k: x.to(dtype) for k, x in single.items()})


def test_same_bits():
    inputs = make_inputs(batch=1, length=17, dim=65)
    assert_equal(run(inputs), run(inputs))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('token', [0, 6])
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.filterwarnings('ignore:invalid value')
def test_not_finite_stays_where_it_is(token, value, activation):
    """Same tokens as by the definition, and no channel but its own."""
    inputs = make_inputs(1, 7, 2)
    inputs[0][:, token, 1] = value
    actual = run(inputs, activation=activation)
    plain = run_plain(inputs, torch.float32, activation=activation)
    for name in ('y', 'dx'):
        assert torch.equal(actual[name].isfinite(), plain[name].isfinite())
    for name in ('dweight', 'dbias'):
        lost = ~plain[name].isfinite()
        assert (~actual[name].isfinite())[lost].all(), name
        assert actual[name][:, 0].isfinite().all(), name


def compile_all():
    """Registers and stack of the table's kernels, as JSON on stdout."""
    found = {}
    for name in REGISTERS:
        which, dtype, architecture = name.split()
        kernel = getattr(kernels, f'_conv_{which}_kernel')
        options = dict(
            fwd=backend.FORWARD_OPTIONS,
            bwd=backend.BACKWARD_OPTIONS,
        )[which]
        constants = backend._constants(torch.empty(2, 64, 4), BOTH, 'silu')
        constants |= options
        warps = constants.pop('num_warps')
        inputs = dict.fromkeys(kernel.arg_names, dtype)
        inputs['parts_ptr'] = 'fp32'
        found[name] = compile_kernel(
            kernel, inputs, constants, int(architecture), num_warps=warps
        )
    # what triton compiles into a kernel: absent tensors, numbers that are 1
    ones = dict.fromkeys(('length', 'dim', 'blocks', 'span', 'x_token'), 1)
    ones |= backend._constants(torch.empty(1, 1, 1), (True,), None)
    ones |= dict(bias_ptr=None, x_batch=1, y_direction=1, dy_token=1)
    ones |= dict(BLOCK_D=64, CHUNK=3)
    for kernel in (kernels._conv_fwd_kernel, kernels._conv_bwd_kernel):
        constants = {k: v for k, v in ones.items() if k in kernel.arg_names}
        compile_kernel(kernel, {}, constants, 90)
    json.dump(found, sys.stdout)


def test_compiles_without_spills(tmp_path):
    """For Ampere, Hopper and Blackwell."""
    assert_compiled(compiled_apart(__file__, tmp_path), REGISTERS)


if __name__ == '__main__':
    compile_all()


@on_gpu
@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('way', ['auto', 'reference'])
def test_public_functions_on_a_gpu(autocast, way, monkeypatch):
    """Both ways, as the reference does it on the rounded inputs."""
    monkeypatch.setenv('MMSTABVIM_BACKEND', way)
    leaves = [x.detach().requires_grad_() for x in make_inputs(length=65)]
    dtype = autocast or torch.float32
    with torch.autocast('cuda', autocast, enabled=autocast is not None):
        y = causal_conv1d_directions(*leaves, activation='silu')
        x, weight, bias = leaves
        one = causal_conv1d(x, weight[1], bias[1], True, activation='silu')
    assert y.dtype == one.dtype == dtype
    grads = torch.autograd.grad(y, leaves, make_gradient(y))
    assert [g.dtype for g in grads] == [torch.float32] * 3
    rounded = [x.detach().to(dtype) for x in leaves]
    plain = run_plain(rounded, dtype)
    exact = run_plain(rounded, torch.float64)
    actual = {k: v.to(dtype) for k, v in named(y, grads, bias).items()}
    assert_accurate(actual, plain, exact)
    if way == 'auto':
        assert torch.equal(one, y[1])
    else:
        torch.testing.assert_close(one, y[1])


@on_gpu
def test_more_than_32_bits_of_elements_on_a_gpu():
    """The last tokens of a huge output equal those of a short one."""
    length, dim = 40_000, 32_768
    x = torch.randn(1, length, dim, dtype=torch.bfloat16, device='cuda')
    weight = torch.randn(2, dim, 4, dtype=torch.bfloat16, device='cuda')
    y = causal_conv1d_directions(x, weight, activation='silu')
    tail = causal_conv1d_directions(x[:, -99:], weight, activation='silu')
    assert torch.equal(y[:, :, -90:], tail[:, :, -90:])


@on_gpu
def test_compiles_in_one_graph_on_a_gpu():
    inputs = make_inputs()
    function = functools.partial(causal_conv1d_directions, activation='silu')
    torch._dynamo.reset()
    compiled = torch.compile(function, backend='aot_eager', fullgraph=True)
    assert torch.equal(compiled(*inputs), function(*inputs))
