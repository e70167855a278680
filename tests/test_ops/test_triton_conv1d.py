"""Triton's causal convolution against the plain one, in float64."""

import functools
import json
import sys

import pytest
import torch
from kernel_checks import (
    assert_compiled,
    compile_kernel,
    compiled_apart,
    on_gpu,
    sparse,
)
from operator_tester import (
    CONV_DIRECTIONS,
    DEVICE,
    assert_equal,
    convert,
    copied,
    make_seed,
)

from mmstabvim.ops import causal_conv1d, causal_conv1d_directions

triton = pytest.importorskip('triton')

from mmstabvim.ops.causal_conv1d import kernels  # noqa: E402
from mmstabvim.ops.causal_conv1d import triton as backend  # noqa: E402

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


make_inputs = functools.partial(CONV_DIRECTIONS.make, device=DEVICE)


def run(inputs, seed=None, activation='silu', **options):
    """Output and gradients of the kernels."""
    seeds = None if seed is None else {'y': seed}
    options['activation'] = activation
    return CONV_DIRECTIONS.run(inputs, 'triton', seeds=seeds, **options)


def check(inputs, activation='silu', **options):
    """Kernels against plain PyTorch and against float64."""
    options['activation'] = activation
    CONV_DIRECTIONS.check(inputs, 'triton', **options)


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
    check(make_inputs(batch=1, length=length, dim=3, width=width))


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('activation', [None, 'silu'])
def test_options(bias, activation):
    inputs = make_inputs(batch=1, length=9, dim=3, bias=bias)
    check(inputs, activation=activation)


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize(
    'reverse',
    [(False,), (True,), (True, False), (True, True, False)],
    ids=str,
)
def test_orders(reverse, shared):
    """All directions over one x, or each over its own."""
    sizes = dict(batch=1, length=9, dim=3, shared=shared)
    check(make_inputs(len(reverse), **sizes), reverse=reverse)


def test_every_token_has_a_span():
    for length in range(1, 600):
        for batch in (1, 700):
            blocks, span = backend.tiling(batch, length, 5)
            rows = blocks * backend.BLOCK_R
            assert rows * span >= length > (blocks - 1) * backend.BLOCK_R
            assert span <= max(backend.SPANS)
            assert span == 1 or rows * (span - 1) < length


def test_copies_no_strided_input():
    """A half of the input projection's output is read where it lies."""
    x = make_inputs()['x']
    assert not x.is_contiguous()
    assert backend._rows(x) is x


def test_copies_no_view_of_flat_parameters():
    """(directions * dim, width) as a layer keeps them."""
    flat = torch.zeros(2 * 17, 4), torch.zeros(2 * 17)
    weight, bias = (x.unflatten(0, (2, 17)) for x in flat)
    for given, own in zip(
        flat, backend._parameters(weight, bias, slice(2)), strict=True
    ):
        assert own.data_ptr() == given.data_ptr()


@pytest.mark.skipif(DEVICE == 'cuda', reason='needs memory that is not there')
@pytest.mark.parametrize('strides', [(9, 2**30, 1), (2**30, 3, 1)], ids=str)
def test_offsets_beyond_32_bits(strides):
    """Addresses in tensors of more than 2**31 elements."""
    order = (False, True, False)
    near = convert(make_inputs(3, batch=3, length=3, dim=3), torch.float16)
    x = sparse((3, 3, 3), strides).copy_(near['x'])
    dy = sparse((3, 3, 3, 3), (2**30 + 27, *strides))
    dy.copy_(make_seed(dy))
    wanted = run(near, copied(dy), reverse=order)
    assert_equal(run(near | {'x': x}, dy, reverse=order), wanted)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """As if the inputs had been converted first; results rounded once."""
    inputs = convert(make_inputs(batch=1, length=21, dim=3), dtype)
    check(inputs)
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        return  # where the interpreter cuts digits off
    single = run(convert(inputs, torch.float32))
    assert_equal(run(inputs), {k: x.to(dtype) for k, x in single.items()})


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('token', [0, 6])
@pytest.mark.parametrize('activation', [None, 'silu'])
@pytest.mark.filterwarnings('ignore:invalid value')
def test_not_finite_stays_where_it_is(token, value, activation):
    """Same tokens as by the definition, and no channel but its own."""
    inputs = make_inputs(batch=1, length=7, dim=2)
    inputs['x'][:, token, 1] = value
    actual = run(inputs, activation=activation)
    plain = CONV_DIRECTIONS.run(inputs, activation=activation)
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
def test_public_functions_on_a_gpu(autocast, way):
    """Both ways, as the reference does it on the rounded inputs."""
    inputs, tester = make_inputs(length=65), CONV_DIRECTIONS
    dtype = autocast or torch.float32
    rounded, options = convert(inputs, dtype), dict(activation='silu')
    x, weight, bias = inputs.values()
    with torch.autocast('cuda', autocast, enabled=autocast is not None):
        actual = tester.run(inputs, way, **options)
        one = causal_conv1d(x, weight[1], bias[1], True, 'silu', way)
    assert actual['y'].dtype == one.dtype == dtype
    tester.assert_close(
        convert(actual, dtype),
        tester.run(rounded, **options),
        tester.run(rounded, dtype=torch.float64, **options),
    )
    if way == 'auto':
        assert torch.equal(one, actual['y'][1])
    else:
        torch.testing.assert_close(one, actual['y'][1])


@on_gpu
def test_more_than_32_bits_of_elements_on_a_gpu():
    """The last tokens of a huge output equal those of a short one."""
    length, dim = 40_000, 32_768
    x = torch.randn(1, length, dim, dtype=torch.bfloat16, device='cuda')
    weight = torch.randn(2, dim, 4, dtype=torch.bfloat16, device='cuda')
    y = causal_conv1d_directions(x, weight, activation='silu')
    tail = causal_conv1d_directions(x[:, -99:], weight, activation='silu')
    assert torch.equal(y[:, :, -90:], tail[:, :, -90:])
