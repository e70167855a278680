"""The norm of a residual stream, and its Triton kernels."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    assert_compiled,
    compile_kernel,
    compiled_apart,
    on_gpu,
)
from operator_tester import ADD_NORM, DEVICE, HALF, NORM
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import add_rms_norm, rms_norm

triton = pytest.importorskip('triton')

from mmstabvim.ops.rms_norm import kernels  # noqa: E402
from mmstabvim.ops.rms_norm import triton as backend  # noqa: E402

EPS = 1e-5

REGISTERS = {
    'fwd 192 80': 56,
    'fwd 192 90': 48,
    'fwd 192 100': 56,
    'fwd 8192 90': 40,
    'bwd 192 80': 128,
    'bwd 192 90': 96,
    'bwd 192 100': 96,
    'bwd 8192 90': 128,
}
"""Of each lane, bfloat16 into a float32 stream, by channels."""


def make_inputs(*sizes, dtype=torch.float32, device=DEVICE, **named):
    """The stream and the weight stay float32."""
    inputs = ADD_NORM.make(*sizes, device=device, **named)
    return inputs | {'hidden': inputs['hidden'].to(dtype)}


def check(inputs, **options):
    return ADD_NORM.check(inputs, 'triton', **options)


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('tokens', [1, 7, 33])
@pytest.mark.parametrize('dim', [1, 3, 64, 197])
def test_matches_float64(tokens, dim, residual):
    check(make_inputs(tokens, dim, residual))


@pytest.mark.parametrize('dim', [2049, 8192])
def test_many_channels(dim):
    """One token fills a tile, and more warps."""
    assert backend.tile_options(dim)['BLOCK_R'] == 1
    check(make_inputs(3, dim))


def test_many_tokens():
    """Several programs, each with several tiles, and a rest."""
    tile = backend.tile_options(700)
    tokens = 2 * backend.TILES * tile['BLOCK_R'] + tile['BLOCK_R'] + 1
    assert tile['BLOCK_R'] > 1
    check(make_inputs(tokens, 700))


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('residual', [False, True])
def test_half_precision_into_a_float32_stream(dtype, residual):
    """As if hidden had been converted first; results rounded once."""
    inputs = make_inputs(residual=residual, dtype=dtype)
    actual = check(inputs, out_dtype=dtype)
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        return  # where the interpreter cuts digits off
    wide = inputs | {'hidden': inputs['hidden'].float()}
    single = ADD_NORM.run(wide, 'triton')
    assert torch.equal(actual['normed'], single['normed'].to(dtype))
    assert torch.equal(actual['dhidden'], single['dhidden'].to(dtype))
    assert torch.equal(actual['stream'], single['stream'])
    if residual:
        assert torch.equal(actual['dresidual'], single['dresidual'])


def test_tiny_tokens():
    """Where ``eps`` decides, and a token of zeros."""
    inputs = make_inputs()
    for name in ('hidden', 'residual'):
        inputs[name] *= 1e-4
        inputs[name][2] = 0
    check(inputs)


@pytest.mark.parametrize('used', ['normed', 'stream'])
def test_gradient_of_one_output_alone(used):
    grads = []
    for name in ('triton', 'reference'):
        inputs = make_inputs()
        leaves = [x.requires_grad_() for x in inputs.values()]
        output = ADD_NORM.function(**inputs, backend=name)[used]
        loss = output.square().sum()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for actual, wanted in zip(*grads, strict=True):
        wanted = torch.zeros_like(actual) if wanted is None else wanted
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize('name', ['reference', 'triton'])
def test_counts_no_operations(name):
    """As PyTorch counts its own norm."""
    with FlopCounterMode(display=False) as counter:
        ADD_NORM.run(make_inputs(), name)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('residual', [False, True])
def test_adds_then_normalizes(dtype, residual):
    """The same bits as the two steps, one after the other."""
    inputs = make_inputs(residual=residual, dtype=dtype, device='cpu')
    hidden, stream, weight = inputs.values()
    with torch.autocast('cpu', torch.bfloat16):
        actual = add_rms_norm(hidden, stream, weight, EPS)
        half, _ = add_rms_norm(hidden, stream, weight, EPS, torch.bfloat16)
    wanted = hidden.float() if stream is None else stream + hidden.float()
    assert torch.equal(actual[1], wanted)
    assert torch.equal(actual[0], F.rms_norm(wanted, (5,), weight, EPS))
    assert torch.equal(actual[0], rms_norm(wanted, weight, EPS))
    assert torch.equal(half, actual[0].bfloat16())


def test_norm_alone_is_one_without_a_residual():
    x, weight = NORM.make(device=DEVICE).values()
    normed, _ = add_rms_norm(x, None, weight, backend='triton')
    assert torch.equal(rms_norm(x, weight, backend='triton'), normed)


def test_checks_its_arguments():
    hidden, residual, weight = make_inputs().values()
    with pytest.raises(ValueError, match=r'weight must be \(5,\)'):
        add_rms_norm(hidden, residual, weight[1:])
    with pytest.raises(ValueError, match=r'shape of hidden \(9, 5\), got'):
        add_rms_norm(hidden, residual[1:], weight)


def test_too_many_channels_are_refused():
    with pytest.raises(ValueError, match='at most 8192 a token'):
        add_rms_norm(**make_inputs(1, 8193), backend='triton')


def compile_all():
    """Registers and stack of the table's kernels, as JSON on stdout."""
    found = {}
    for name in REGISTERS:
        which, dim, architecture = name.split()
        kernel = getattr(kernels, f'_norm_{which}_kernel')
        constants = backend.tile_options(int(dim))
        warps = constants.pop('num_warps')
        if which == 'bwd':
            constants['TILES'] = backend.TILES
        pointers = dict.fromkeys(
            ('x_ptr', 'normed_ptr', 'dnormed_ptr'), 'bf16'
        )
        pointers['dx_ptr'] = 'bf16'
        found[name] = compile_kernel(
            kernel, pointers, constants, int(architecture), num_warps=warps
        )
    ones = dict(tokens=1, dim=1, BLOCK_R=4, BLOCK_D=1)
    absent = dict(residual_ptr=None, stream_ptr=None)
    compile_kernel(kernels._norm_fwd_kernel, {}, ones | absent, 90)
    absent = dict(dstream_ptr=None, dresidual_ptr=None, TILES=2)
    compile_kernel(kernels._norm_bwd_kernel, {}, ones | absent, 90)
    json.dump(found, sys.stdout)


def test_compiles_without_spills(tmp_path):
    """For Ampere, Hopper and Blackwell."""
    assert_compiled(compiled_apart(__file__, tmp_path), REGISTERS)


if __name__ == '__main__':
    compile_all()


@on_gpu
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize('way', ['auto', 'reference'])
def test_public_function_on_a_gpu(dtype, residual, way):
    """Both ways, under autocast, which must not matter."""
    inputs = make_inputs(99, 192, residual, dtype=dtype)
    with torch.autocast('cuda', torch.bfloat16):
        actual = ADD_NORM.run(inputs, way, out_dtype=dtype)
    plain = ADD_NORM.run(inputs, out_dtype=dtype)
    exact = ADD_NORM.run(inputs, dtype=torch.float64)
    ADD_NORM.assert_close(actual, plain, exact)
