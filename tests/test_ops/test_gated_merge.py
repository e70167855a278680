"""The gated merge by its formula, and its Triton kernels."""

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
    sparse,
)
from operator_tester import (
    DEVICE,
    HALF,
    MERGE,
    assert_equal,
    convert,
    copied,
    make_seed,
)
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import gated_merge

triton = pytest.importorskip('triton')

from mmstabvim.ops.gated_merge import kernels  # noqa: E402
from mmstabvim.ops.gated_merge import triton as backend  # noqa: E402

REGISTERS = {
    'fwd 80': 34,
    'fwd 90': 34,
    'fwd 100': 34,
    'bwd 80': 56,
    'bwd 90': 46,
    'bwd 100': 48,
}
"""Of each lane, two directions, bfloat16, by architecture."""


def make_inputs(*sizes, **named):
    return MERGE.make(*sizes, device=DEVICE, **named)


def run(inputs, seed=None, **options):
    """Output and gradients of the kernels."""
    seeds = None if seed is None else {'out': seed}
    return MERGE.run(inputs, 'triton', seeds=seeds, **options)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('directions', [1, 2, 3, 4])
def test_by_its_formula(directions, reduction):
    """The same bits in float32, and in half precision rounded once."""
    y, z = MERGE.make(directions).values()
    wanted = sum(y[k] for k in range(directions)) * F.silu(z)
    wanted = wanted / directions if reduction == 'mean' else wanted
    assert torch.equal(gated_merge(y, z, reduction), wanted)
    for dtype in HALF:
        rounded = y.to(dtype), z.to(dtype)
        wide = gated_merge(*(x.float() for x in rounded), reduction)
        assert torch.equal(gated_merge(*rounded, reduction), wide.to(dtype))
        mixed = gated_merge(y, z.to(dtype), reduction)
        wanted = gated_merge(y, z.to(dtype).float(), reduction)
        assert torch.equal(mixed, wanted)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('directions', [1, 2, 3, 4])
@pytest.mark.parametrize('length', [1, 15, 16, 17, 197])
def test_lengths_and_directions(directions, length, reduction):
    inputs = make_inputs(directions, length=length, dim=3)
    MERGE.check(inputs, 'triton', reduction=reduction)


@pytest.mark.parametrize('dim', [1, 127, 129])
def test_dims(dim):
    MERGE.check(make_inputs(dim=dim), 'triton')


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('which', ['y', 'z', 'yz'])
def test_half_precision(dtype, which):
    """As if the inputs had been converted first; results rounded once."""
    inputs = make_inputs()
    inputs |= {name: inputs[name].to(dtype) for name in which}
    actual, single = run(inputs), run(convert(inputs, torch.float32))
    dtypes = {name: x.dtype for name, x in inputs.items()}
    assert actual['out'].dtype == actual['dy'].dtype == dtypes['y']
    assert actual['dz'].dtype == dtypes['z']
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        return  # where the interpreter cuts digits off
    wanted = {k: x.to(actual[k].dtype) for k, x in single.items()}
    assert_equal(actual, wanted)


@pytest.mark.skipif(DEVICE == 'cuda', reason='needs memory that is not there')
@pytest.mark.parametrize('strides', [(9, 2**30, 1), (2**30, 3, 1)], ids=str)
def test_offsets_beyond_32_bits(strides):
    """Addresses in tensors of more than 2**31 elements."""
    near = convert(make_inputs(3, 3, 3, 3), torch.float16)
    y = sparse((3, 3, 3, 3), (2**30 + 27, *strides)).copy_(near['y'])
    z, dout = (sparse((3, 3, 3), strides) for _ in range(2))
    z.copy_(near['z'])
    dout.copy_(make_seed(z))
    assert_equal(run(dict(y=y, z=z), dout), run(near, copied(dout)))


@pytest.mark.filterwarnings('ignore:overflow encountered')
@pytest.mark.parametrize('value', [100.0, -100.0, 1e30, -1e30])
def test_far_gates(value):
    """Open or shut, without overflow."""
    inputs = make_inputs()
    inputs['z'] = torch.full_like(inputs['z'], value)
    exact = MERGE.run(inputs, dtype=torch.float64)
    for name, x in run(inputs).items():
        torch.testing.assert_close(x.double(), exact[name])


def test_directions_share_one_gradient():
    dy = run(make_inputs())['dy']
    assert dy.stride(0) == 0


@pytest.mark.parametrize('backend', ['reference', 'triton'])
def test_counts_no_operations(backend):
    """As PyTorch counts elementwise ones."""
    with FlopCounterMode(display=False) as counter:
        MERGE.run(make_inputs(), backend)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    'shapes',
    [
        ((2, 3, 4), (3, 4)),
        ((2, 1, 3, 4), (1, 3, 5)),
        ((0, 1, 3, 4), (1, 3, 4)),
    ],
    ids=str,
)
def test_checks_its_arguments(shapes):
    with pytest.raises(ValueError, match='y must be '):
        gated_merge(*map(torch.zeros, shapes))


def test_checks_the_reduction():
    with pytest.raises(ValueError, match=r"reduction must be .*'max'"):
        gated_merge(torch.zeros(2, 1, 3, 4), torch.zeros(1, 3, 4), 'max')


@pytest.mark.parametrize('shape', [(2, 0, 3, 4), (2, 1, 0, 4)], ids=str)
def test_nothing_to_merge(shape):
    y = torch.zeros(shape, device=DEVICE)
    assert gated_merge(y, y[0]).shape == shape[1:]


def compile_all():
    """Registers and stack of the table's kernels, as JSON on stdout."""
    found = {}
    constants = dict(backend.TILE, DIRECTIONS=2, DIVISOR=2)
    warps = constants.pop('num_warps')
    for name in REGISTERS:
        which, architecture = name.split()
        kernel = getattr(kernels, f'_merge_{which}_kernel')
        pointers = dict.fromkeys(kernel.arg_names, 'bf16')
        found[name] = compile_kernel(
            kernel, pointers, constants, int(architecture), num_warps=warps
        )
    ones = dict(length=1, dim=1, blocks=1, y_batch=1, z_token=1)
    ones |= dict(DIRECTIONS=1, DIVISOR=1)
    for kernel in (kernels._merge_fwd_kernel, kernels._merge_bwd_kernel):
        compile_kernel(
            kernel, {}, constants | ones | dict(DIRECTIONS=1, DIVISOR=1), 90
        )
    json.dump(found, sys.stdout)


def test_compiles_without_spills(tmp_path):
    """For Ampere, Hopper and Blackwell."""
    assert_compiled(compiled_apart(__file__, tmp_path), REGISTERS)


if __name__ == '__main__':
    compile_all()


@on_gpu
@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize('way', ['auto', 'reference'])
def test_public_function_on_a_gpu(dtype, way):
    """Both ways, under autocast as well."""
    inputs = convert(make_inputs(dim=384), dtype)
    with torch.autocast('cuda', torch.bfloat16):
        actual = MERGE.run(inputs, way)
    plain, exact = MERGE.run(inputs), MERGE.run(inputs, dtype=torch.float64)
    MERGE.assert_close(actual, plain, exact)
    assert (actual['dy'].stride(0) == 0) == (way == 'auto')
