"""The norm of a residual stream: PyTorch's as ever, Triton's in float64."""

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
    on_gpu,
)
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import add_rms_norm, rms_norm
from mmstabvim.ops.rms_norm import add_rms_norm_ref

triton = pytest.importorskip('triton')

from mmstabvim.ops.rms_norm import kernels  # noqa: E402
from mmstabvim.ops.rms_norm import triton as backend  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
HALF = [torch.bfloat16, torch.float16]
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


def make_inputs(tokens=9, dim=5, dtype=torch.float32, residual=True):
    """Hidden, residual and weight, reproducible."""
    generator = torch.Generator().manual_seed(1000 * tokens + dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    hidden = normal(tokens, dim).to(dtype)
    return hidden, normal(tokens, dim) if residual else None, normal(dim)


def make_gradients(outputs):
    """Of the outputs; multiples of 1/8 are exact in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(x.shape, generator=generator).mul(8).round() / 8).to(x)
        for x in outputs
    ]


def named(outputs, grads):
    names = ('normed', 'stream', 'dhidden', 'dresidual', 'dweight')
    return {
        name: x.detach()
        for name, x in zip(names, (*outputs, *grads), strict=True)
        if x is not None and x.numel()
    }


def run(inputs, out_dtype=torch.float32):
    """Outputs and gradients of the kernels."""
    hidden, residual, weight = inputs
    outputs = backend.forward(*inputs, EPS, out_dtype)
    dnormed, dstream = make_gradients(outputs)
    stream = hidden if residual is None else outputs[1]
    split = residual is not None and hidden.dtype != torch.float32
    grads = list(
        backend.backward(
            dnormed,
            None if residual is None else dstream,
            stream,
            weight,
            EPS,
            hidden.dtype,
            split,
        )
    )
    if residual is not None and not split:
        grads[1] = grads[0]
    return named(outputs, grads)


def run_plain(inputs, out_dtype=torch.float32, dtype=None, norm=None):
    """The same by autograd, in some dtype."""
    leaves = [
        None if x is None else x.to(dtype or x.dtype).requires_grad_()
        for x in (None if x is None else x.detach().clone() for x in inputs)
    ]
    outputs = (norm or add_rms_norm_ref)(*leaves, EPS, dtype or out_dtype)
    if inputs[1] is None:
        outputs = outputs[:1]
    gradients = make_gradients(outputs)
    present = [x for x in leaves if x is not None]
    grads = list(torch.autograd.grad(outputs, present, gradients))
    if inputs[1] is None:
        outputs, grads = (*outputs, None), [grads[0], None, grads[1]]
    return named(outputs, grads)


def check(inputs, out_dtype=torch.float32, actual=None):
    """Kernels against plain PyTorch and against float64."""
    actual = run(inputs, out_dtype) if actual is None else actual
    plain = run_plain(inputs, out_dtype)
    exact = run_plain(inputs, dtype=torch.float64)
    terms = {'dweight': len(inputs[0]), 'dhidden': 1, 'dresidual': 1}
    for name in plain:
        only = ({name: x[name]} for x in (actual, plain, exact))
        eps = torch.finfo(plain[name].dtype).eps
        assert_close(*only, eps, terms, terms.get(name))


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('tokens', [1, 7, 33])
@pytest.mark.parametrize('dim', [1, 3, 64, 197])
def test_matches_float64(tokens, dim, residual):
    check(make_inputs(tokens, dim, residual=residual))


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
def test_half_precision(dtype, residual):
    """As if hidden had been converted first; results rounded once."""
    hidden, *others = make_inputs(dtype=dtype, residual=residual)
    actual = run((hidden, *others), dtype)
    check((hidden, *others), dtype, actual)
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        return  # where the interpreter cuts digits off
    single = run((hidden.float(), *others))
    for name in ('normed', 'dhidden'):
        assert torch.equal(actual[name], single[name].to(dtype)), name
    if residual:
        assert torch.equal(actual['stream'], single['stream'])
        assert torch.equal(actual['dresidual'], single['dresidual'])


def test_tiny_tokens():
    """Where ``eps`` decides, and a token of zeros."""
    hidden, residual, weight = make_inputs()
    hidden, residual = hidden * 1e-4, residual * 1e-4
    hidden[2], residual[2] = 0, 0
    check((hidden, residual, weight))


def test_same_bits():
    inputs = make_inputs(tokens=70, dim=65)
    assert_equal(run(inputs), run(inputs))


@pytest.mark.skipif(DEVICE == 'cuda', reason='runs there anyway')
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_registered_with_pytorch(residual, dtype):
    """Schema, fake tensors and autograd; the kernels' results go through."""
    inputs = make_inputs(dtype=dtype, residual=residual)
    leaves = [None if x is None else x.requires_grad_() for x in inputs]
    operator = torch.ops.mmstabvim.add_rms_norm
    torch.library.opcheck(operator, (*leaves, EPS, dtype))
    inputs = [None if x is None else x.detach() for x in leaves]
    actual = run_plain(inputs, dtype, norm=operator)
    assert_equal(actual, run(inputs, dtype))


@pytest.mark.skipif(DEVICE == 'cuda', reason='runs there anyway')
@pytest.mark.parametrize('used', [0, 1])
def test_gradient_of_one_output_alone(used):
    leaves = [x.requires_grad_() for x in make_inputs()]
    grads = []
    for norm in (torch.ops.mmstabvim.add_rms_norm, add_rms_norm_ref):
        output = norm(*leaves, EPS, torch.float32)[used]
        loss = output.square().sum()
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for actual, wanted in zip(*grads, strict=True):
        wanted = torch.zeros_like(actual) if wanted is None else wanted
        torch.testing.assert_close(actual, wanted)


def test_counts_no_operations():
    """As PyTorch counts its own norm, on every device."""
    leaves = [x.requires_grad_() for x in make_inputs()]
    with FlopCounterMode(display=False) as counter:
        for norm in (torch.ops.mmstabvim.add_rms_norm, add_rms_norm_ref):
            normed, stream = norm(*leaves, EPS, torch.float32)
            (normed.sum() + stream.sum()).backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('residual', [False, True])
def test_plain_path_adds_then_normalizes(dtype, residual):
    """The same bits as the two steps, one after the other."""
    hidden, stream, weight = (
        None if x is None else x.cpu()
        for x in make_inputs(dtype=dtype, residual=residual)
    )
    with torch.autocast('cpu', torch.bfloat16):
        actual = add_rms_norm(hidden, stream, weight, EPS)
        half, _ = add_rms_norm(hidden, stream, weight, EPS, torch.bfloat16)
    wanted = hidden.float() if stream is None else stream + hidden.float()
    assert torch.equal(actual[1], wanted)
    assert torch.equal(actual[0], F.rms_norm(wanted, (5,), weight, EPS))
    assert torch.equal(actual[0], rms_norm(wanted, weight, EPS))
    assert torch.equal(half, actual[0].bfloat16())


@pytest.mark.parametrize('residual', [False, True])
def test_gradcheck_of_the_plain_path(residual):
    leaves = [
        None if x is None else x.cpu().double().requires_grad_()
        for x in make_inputs(residual=residual)
    ]
    assert torch.autograd.gradcheck(add_rms_norm, leaves)


@pytest.mark.parametrize('function', [add_rms_norm, rms_norm])
def test_compiles_in_one_graph(function):
    inputs = make_inputs()
    if function is rms_norm:
        inputs = inputs[::2]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


def test_checks_its_arguments():
    hidden, residual, weight = make_inputs()
    with pytest.raises(ValueError, match=r'weight must be \(5,\)'):
        add_rms_norm(hidden, residual, weight[1:])
    with pytest.raises(ValueError, match=r'shape of hidden \(9, 5\), got'):
        add_rms_norm(hidden, residual[1:], weight)


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
def test_public_function_on_a_gpu(dtype, residual, way, monkeypatch):
    """Both ways, under autocast, which must not matter."""
    monkeypatch.setenv('MMSTABVIM_BACKEND', way)
    inputs = make_inputs(99, 192, dtype, residual)
    with torch.autocast('cuda', torch.bfloat16):
        actual = run_plain(inputs, dtype, norm=add_rms_norm)
    check(inputs, dtype, actual)
    normed, stream = add_rms_norm(*inputs, EPS)
    torch.testing.assert_close(rms_norm(stream, inputs[2], EPS), normed)


@on_gpu
def test_compiles_in_one_graph_on_a_gpu():
    inputs = make_inputs(99, 192)
    torch._dynamo.reset()
    compiled = torch.compile(add_rms_norm, backend='aot_eager', fullgraph=True)
    for actual, wanted in zip(
        compiled(*inputs), add_rms_norm(*inputs), strict=True
    ):
        assert torch.equal(actual, wanted)
