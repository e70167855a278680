"""The gated merge: PyTorch's by its formula, Triton's in float64."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
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
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import gated_merge
from mmstabvim.ops.gated_merge import gated_merge_ref

triton = pytest.importorskip('triton')

from mmstabvim.ops.gated_merge import kernels  # noqa: E402
from mmstabvim.ops.gated_merge import triton as backend  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
HALF = [torch.bfloat16, torch.float16]

REGISTERS = {
    'fwd 80': 34,
    'fwd 90': 34,
    'fwd 100': 34,
    'bwd 80': 56,
    'bwd 90': 46,
    'bwd 100': 48,
}
"""Of each lane, two directions, bfloat16, by architecture."""


def make_inputs(directions=2, batch=2, length=7, dim=5, device=DEVICE):
    """y, and z as half of a wider tensor, float32, reproducible."""
    generator = torch.Generator().manual_seed(1000 * length + dim)
    y = torch.randn(directions, batch, length, dim, generator=generator)
    z = 3 * torch.randn(batch, length, 2 * dim, generator=generator)
    return y.to(device), z.to(device)[..., dim:]


def make_gradient(z):
    """Of the output; multiples of 1/8 are exact in every dtype."""
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(z.shape, generator=generator).mul(8).round() / 8
    return dout.to(z.device)


def run(y, z, dout=None):
    """Output and gradients of the kernels."""
    dout = make_gradient(z).to(y.dtype) if dout is None else dout
    dy, dz = backend.backward(dout, y, z)
    return dict(out=backend.forward(y, z), dy=dy, dz=dz)


def run_plain(y, z, dtype=None):
    """The same by autograd, in some dtype; dy of the last direction."""
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in (y, z)]
    out = gated_merge_ref(*leaves)
    dout = make_gradient(z).to(out.dtype)
    dy, dz = torch.autograd.grad(out, leaves, dout)
    return dict(out=out.detach(), dy=dy[-1], dz=dz)


def check(y, z):
    """Kernels against plain PyTorch and against float64."""
    plain, exact = run_plain(y, z), run_plain(y, z, torch.float64)
    assert_close(run(y, z), plain, exact, torch.finfo(y.dtype).eps)


@pytest.mark.parametrize('directions', [1, 2, 3])
def test_by_its_formula(directions):
    """The same bits in float32, and in half precision rounded once."""
    y, z = make_inputs(directions, device='cpu')
    wanted = sum(y[k] for k in range(directions)) * F.silu(z) / directions
    assert torch.equal(gated_merge(y, z), wanted)
    for dtype in HALF:
        rounded = y.to(dtype), z.to(dtype)
        wanted = gated_merge(*(x.float() for x in rounded)).to(dtype)
        assert torch.equal(gated_merge(*rounded), wanted)
        mixed = gated_merge(y, z.to(dtype))
        assert torch.equal(mixed, gated_merge(y, z.to(dtype).float()))
        with torch.autocast('cpu', dtype):
            assert torch.equal(gated_merge(y, z), gated_merge(y, z))
            assert gated_merge(y, z).dtype == torch.float32


def test_gradcheck_of_the_reference():
    leaves = [x.double().requires_grad_() for x in make_inputs(device='cpu')]
    assert torch.autograd.gradcheck(gated_merge, leaves)


@pytest.mark.parametrize('directions', [1, 2, 3])
@pytest.mark.parametrize('length', [1, 15, 16, 17, 197])
def test_matches_float64(directions, length):
    check(*make_inputs(directions, length=length, dim=3))


@pytest.mark.parametrize('dim', [1, 127, 129])
def test_dims(dim):
    check(*make_inputs(dim=dim))


@pytest.mark.parametrize('dtype', HALF, ids=str)
@pytest.mark.parametrize('which', ['y', 'z', 'both'])
def test_half_precision(dtype, which):
    """As if the inputs had been converted first; results rounded once."""
    y, z = make_inputs()
    y = y if which == 'z' else y.to(dtype)
    z = z if which == 'y' else z.to(dtype)
    actual, single = run(y, z), run(y.float(), z.float())
    assert [actual[k].dtype for k in actual] == [y.dtype, y.dtype, z.dtype]
    if which == 'both':
        check(y, z)
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        return  # where the interpreter cuts digits off
    wanted = {k: x.to(actual[k].dtype) for k, x in single.items()}
    assert_equal(actual, wanted)


@pytest.mark.parametrize('axes', [(0,), (1,), (2,), (0, 1)], ids=str)
def test_strides(axes):
    steps = tuple(slice(None, None, 2 if i in axes else 1) for i in range(3))
    y, z = make_inputs(3, 4, 6, 10)
    y, z = y[(slice(None, None, 2), *steps)], z[steps]
    dout = make_gradient(make_inputs(1, 4, 6, 10)[1])[steps]
    dense = run(copied(y), copied(z), copied(dout))
    assert_equal(run(y, z, dout), dense)
    dout = dout[:, :1].expand_as(z)
    assert_equal(run(y, z, dout), run(y, z, copied(dout)))


@pytest.mark.skipif(DEVICE == 'cuda', reason='needs memory that is not there')
@pytest.mark.parametrize('strides', [(9, 2**30, 1), (2**30, 3, 1)], ids=str)
def test_offsets_beyond_32_bits(strides):
    """Addresses in tensors of more than 2**31 elements."""
    near = [x.half() for x in make_inputs(3, 3, 3, 3)]
    y = sparse((3, 3, 3, 3), (2**30 + 27, *strides)).copy_(near[0])
    z, dout = (sparse((3, 3, 3), strides) for _ in range(2))
    z.copy_(near[1])
    dout.copy_(make_gradient(z))
    wanted = run(*near, dout=copied(dout))
    assert_equal(run(y, z, dout), wanted)


def test_same_bits():
    inputs = make_inputs()
    assert_equal(run(*inputs), run(*inputs))


@pytest.mark.filterwarnings('ignore:overflow encountered')
@pytest.mark.parametrize('value', [100.0, -100.0, 1e30, -1e30])
def test_far_gates(value):
    """Open or shut, without overflow."""
    y, z = make_inputs()
    z = torch.full_like(z, value)
    for name, x in run(y, z).items():
        exact = run_plain(y, z, torch.float64)[name]
        torch.testing.assert_close(x.double(), exact)


@pytest.mark.skipif(DEVICE == 'cuda', reason='runs there anyway')
def test_registered_with_pytorch():
    """Schema, fake tensors and autograd registration are sound."""
    for dtype in (torch.float32, torch.float16):
        leaves = [x.to(dtype).requires_grad_() for x in make_inputs()]
        operator = torch.ops.mmstabvim.gated_merge
        torch.library.opcheck(operator, leaves)
        out = operator(*leaves)
        dout = make_gradient(out).to(dtype)
        dy, dz = torch.autograd.grad(out, leaves, dout)
        assert dy.stride(0) == 0
        actual = dict(out=out.detach(), dy=dy[-1], dz=dz)
        assert_equal(actual, run(*(x.detach() for x in leaves)))


def test_counts_no_operations():
    """As PyTorch counts elementwise ones, on every device."""
    with FlopCounterMode(display=False) as counter:
        y, z = (x.requires_grad_() for x in make_inputs())
        torch.ops.mmstabvim.gated_merge(y, z).sum().backward()
        gated_merge_ref(y, z).sum().backward()
    assert counter.get_total_flops() == 0


def test_compiles_in_one_graph():
    inputs = make_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(gated_merge, backend='aot_eager', fullgraph=True)
    assert torch.equal(compiled(*inputs), gated_merge(*inputs))


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


@pytest.mark.parametrize('shape', [(2, 0, 3, 4), (2, 1, 0, 4)], ids=str)
def test_nothing_to_merge(shape):
    y = torch.zeros(shape, device=DEVICE)
    assert gated_merge(y, y[0]).shape == shape[1:]


def compile_all():
    """Registers and stack of the table's kernels, as JSON on stdout."""
    found = {}
    constants = dict(backend.TILE, DIRECTIONS=2)
    warps = constants.pop('num_warps')
    for name in REGISTERS:
        which, architecture = name.split()
        kernel = getattr(kernels, f'_merge_{which}_kernel')
        pointers = dict.fromkeys(kernel.arg_names, 'bf16')
        found[name] = compile_kernel(
            kernel, pointers, constants, int(architecture), num_warps=warps
        )
    ones = dict(length=1, dim=1, blocks=1, y_batch=1, z_token=1)
    for kernel in (kernels._merge_fwd_kernel, kernels._merge_bwd_kernel):
        compile_kernel(kernel, {}, constants | ones | dict(DIRECTIONS=1), 90)
    json.dump(found, sys.stdout)


def test_compiles_without_spills(tmp_path):
    """For Ampere, Hopper and Blackwell."""
    assert_compiled(compiled_apart(__file__, tmp_path), REGISTERS)


if __name__ == '__main__':
    compile_all()


@on_gpu
@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize('way', ['auto', 'reference'])
def test_public_function_on_a_gpu(dtype, way, monkeypatch):
    """Both ways, under autocast as well."""
    monkeypatch.setenv('MMSTABVIM_BACKEND', way)
    inputs = [x.to(dtype) for x in make_inputs(dim=384)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast('cuda', torch.bfloat16):
        out = gated_merge(*leaves)
    dy, dz = torch.autograd.grad(out, leaves, make_gradient(out).to(dtype))
    actual = dict(out=out.detach(), dy=dy[-1], dz=dz)
    plain, exact = run_plain(*inputs), run_plain(*inputs, torch.float64)
    assert_close(actual, plain, exact, torch.finfo(dtype).eps)
    assert (dy.stride(0) == 0) == (way == 'auto')
