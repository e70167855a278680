"""The Triton backend against the definition, interpreted without a GPU."""

import json
import math
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import selective_scan
from mmstabvim.ops.selective_scan.function import scan_flops
from mmstabvim.ops.selective_scan.reference import selective_scan_ref

triton = pytest.importorskip('triton')

from mmstabvim.ops.selective_scan import kernels  # noqa: E402
from mmstabvim.ops.selective_scan import triton as backend  # noqa: E402

tl = triton.language

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

TOLERANCE = 3e-6
"""Of an array's largest magnitude, as for the cpu backend."""

REGISTERS = {
    'fwd real euler': {80: 92, 90: 72, 100: 80},
    'fwd real zoh': {90: 128},
    'fwd complex euler': {80: 97, 90: 98, 100: 96},
    'fwd complex zoh': {90: 120},
    'bwd real euler': {80: 255, 90: 225, 100: 218},
    'bwd real zoh': {90: 237},
    'bwd complex euler': {80: 254, 90: 250, 100: 236},
    'bwd complex zoh': {90: 216},
}
"""Of each lane at N = 16 and bfloat16 inputs, by kernel and architecture."""

SMALLEST = dict.fromkeys(
    ('length', 'channels', 'state', 'B_batch', 'B_token', 'B_group'), 1
) | dict.fromkeys(('D_ptr', 'bias_ptr', 'dlast_ptr'))
SMALLEST |= dict(CONSTANT_C=True, REVERSE=True, SOFTPLUS=False)
"""What triton compiles into a kernel: absent tensors, and numbers that are 1.

The interpreter does not see what that does to types.
"""


@pytest.fixture
def short_chunks(monkeypatch):
    """Several chunks in few tokens: the interpreter is slow."""
    monkeypatch.setattr(backend, 'CHUNK', 4)


def make_inputs(
    batch=1,
    length=9,
    dim=5,
    state=3,
    groups=1,
    complex_a=False,
    constant='',
    absent=(),
):
    """Inputs of the scan by name, float32, reproducible."""
    generator = torch.Generator().manual_seed(length * 1000 + dim + state)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def wide(*shape):
        x = normal(*shape)
        return torch.complex(x, normal(*shape)) if complex_a else x

    def matrix(name):
        if name in constant:
            return wide(dim, state)
        return wide(batch, length, groups, state)

    A = -2 * torch.rand(dim, state, generator=generator)
    inputs = {
        'u': normal(batch, length, dim),
        'delta': normal(batch, length, dim) - 1,
        'A': torch.complex(A, 3 * normal(dim, state)) if complex_a else A,
        'B': matrix('B'),
        'C': matrix('C'),
        'D': normal(dim),
        'delta_bias': normal(dim),
    }
    return {
        name: None if name in absent else x.to(DEVICE)
        for name, x in inputs.items()
    }


def weights(shape, dtype):
    """What the outputs are multiplied with in the tests' loss."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, dtype=dtype, generator=generator).to(DEVICE)


def run(inputs, softplus=True, reverse=False, b_disc='euler'):
    """Both outputs and the gradient of every input, by name."""
    given = (*inputs.values(), softplus, reverse, b_disc)
    y, last, borders = backend.forward(*given, True)
    dlast = weights(last.shape, last.dtype)
    grads = backend.backward(weights(y.shape, y.dtype), dlast, borders, *given)
    names = ('y', 'last', *(f'd{name}' for name in inputs))
    return dict(zip(names, (y, last, *grads), strict=True))


def run_exactly(inputs, softplus=True, reverse=False, b_disc='euler'):
    """The same from the definition in float64."""

    def leaf(x):
        if x is None:
            return None
        wide = torch.complex128 if x.is_complex() else torch.float64
        return x.to(wide).detach().requires_grad_()

    leaves = {name: leaf(x) for name, x in inputs.items()}
    y, last = selective_scan_ref(*leaves.values(), softplus, reverse, b_disc)
    dlast_dtype = torch.complex64 if last.is_complex() else torch.float32
    loss = (y * weights(y.shape, torch.float32)).sum()
    dlast = weights(last.shape, dlast_dtype)
    (loss + (last * dlast.conj()).real.sum()).backward()
    grads = {
        f'd{name}': y.new_empty(0) if x is None else x.grad
        for name, x in leaves.items()
    }
    return {'y': y.detach(), 'last': last.detach(), **grads}


def check(inputs, **options):
    actual = run(inputs, **options)
    for name, exact in run_exactly(inputs, **options).items():
        assert actual[name].shape == exact.shape, name
        if not exact.numel():
            continue
        error = (actual[name] - exact).abs().max()
        bound = TOLERANCE * exact.abs().max()
        assert error <= bound, f'{name}: {error:.2e} > {bound:.2e}'


def assert_equal(actual, wanted):
    for name, x in wanted.items():
        assert actual[name].dtype == x.dtype, name
        assert torch.equal(actual[name], x), name


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('complex_a', [False, True])
def test_matches_reference(complex_a, reverse, b_disc, short_chunks):
    """Values and all gradients, the last state's included."""
    inputs = make_inputs(2, 6, 4, 3, groups=2, complex_a=complex_a)
    check(inputs, reverse=reverse, b_disc=b_disc)


@pytest.mark.parametrize('length', [1, 2, 15, 16, 17, 65, 197])
def test_lengths(length):
    """Around one chunk, and many with a rest; odd ones in reverse."""
    check(make_inputs(length=length), reverse=bool(length % 2))


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize('state', [1, 2, 7, 16, 64])
def test_states_and_channel_blocks(state, complex_a, short_chunks):
    """Tails of both axes of the tile, and blocks of channels to sum over."""
    _, block = backend.tile_shape(state, complex_a)
    dim = 2 * block + 1
    check(make_inputs(1, 5, dim, state, complex_a=complex_a))


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize('constant', ['B', 'C', 'BC'])
def test_constant_matrices(constant, complex_a, short_chunks):
    inputs = make_inputs(
        2, 5, 6, groups=2, constant=constant, complex_a=complex_a
    )
    check(inputs)


@pytest.mark.parametrize('grouped', 'BC')
def test_one_matrix_may_be_shared_by_all_groups(grouped, short_chunks):
    inputs = make_inputs(2, 5, 6)
    inputs[grouped] = make_inputs(2, 5, 6, groups=3)[grouped]
    check(inputs)


@pytest.mark.parametrize('absent', [('D',), ('delta_bias',)], ids=str)
def test_absent_inputs(absent, short_chunks):
    check(make_inputs(absent=absent))


def test_without_softplus(short_chunks):
    inputs = make_inputs(absent=('delta_bias',))
    inputs['delta'] = inputs['delta'].abs()
    check(inputs, softplus=False)


def test_without_gradient_of_the_last_state(short_chunks):
    inputs = make_inputs()
    given = (*inputs.values(), True, False, 'euler')
    y, last, borders = backend.forward(*given, True)
    dy = weights(y.shape, y.dtype)
    absent = backend.backward(dy, None, borders, *given)
    zero = backend.backward(dy, torch.zeros_like(last), borders, *given)
    assert all(map(torch.equal, absent, zero))


def test_states_are_kept_on_demand_only():
    inputs = make_inputs(2, 17, 6, groups=2)
    given = (*inputs.values(), True, False, 'euler')
    y, last, borders = backend.forward(*given, True)
    assert borders.shape == (2, 2, 2, 3, 3)
    bare = backend.forward(*given, False)
    assert bare[2].shape == (0, 2, 2, 3, 3)
    assert torch.equal(bare[0], y)
    assert torch.equal(bare[1], last)


@pytest.mark.parametrize('complex_a', [False, True])
def test_same_bits(complex_a, short_chunks):
    """From run to run."""
    inputs = make_inputs(1, 5, 33, 16, complex_a=complex_a)
    assert_equal(run(inputs), run(inputs))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype, short_chunks):
    """As if they had been converted first; nothing is rounded inside."""
    inputs = {name: x.to(dtype) for name, x in make_inputs().items()}
    widened = {name: x.float() for name, x in inputs.items()}
    assert_equal(run(inputs), run(widened))


@pytest.mark.parametrize('complex_a', [False, True])
def test_non_contiguous(complex_a, short_chunks):
    """Strides are respected, or removed by a copy; so is a lazy conjugate."""
    inputs = make_inputs(2, 5, 6, groups=2, complex_a=complex_a)
    views = {}
    for name, x in inputs.items():
        larger = torch.stack([x, torch.full_like(x, 9)], dim=-1)
        views[name] = larger[..., 0]
    tokens_last = inputs['B'].movedim(1, 3).contiguous().movedim(3, 1)
    padded = torch.cat([inputs['C'], inputs['C']], dim=3)[..., :3]
    views |= {'B': tokens_last, 'C': padded}
    if complex_a:
        views['A'] = inputs['A'].conj().resolve_conj().conj()
    assert not any(views[name].is_contiguous() for name in 'uBC')
    assert_equal(run(views), run(inputs))


@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'C', 'D'])
@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_nan_stays_visible(name, b_disc):
    inputs = make_inputs(length=2, dim=2, state=2)
    inputs[name].view(-1)[0] = float('nan')
    actual = run(inputs, b_disc=b_disc)
    for key, exact in run_exactly(inputs, b_disc=b_disc).items():
        assert torch.equal(actual[key].isnan(), exact.isnan()), key


@triton.jit
def _evaluate_kernel(
    x_ptr, softplus_ptr, cos_ptr, sin_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    cos, sin = kernels._cos_sin(x)
    tl.store(softplus_ptr + offs, kernels._softplus(x))
    tl.store(cos_ptr + offs, cos)
    tl.store(sin_ptr + offs, sin)


def evaluate(x):
    """Functions of the kernels at x, by name, and x in float64."""
    results = {
        name: torch.empty_like(x) for name in ('softplus', 'cos', 'sin')
    }
    _evaluate_kernel[(1,)](x, *results.values(), BLOCK=x.numel())
    return results, x.double()


@triton.jit
def _phi1_kernel(
    x_ptr, phi1_ptr, slope_ptr, COMPLEX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < BLOCK
    x = kernels._load(x_ptr, offs, mask, COMPLEX)
    exp_x = kernels._decay(1.0, x, COMPLEX)
    phi1, slope = kernels._phi1(x, exp_x, COMPLEX)
    kernels._store(phi1_ptr, offs, phi1, mask, COMPLEX)
    kernels._store(slope_ptr, offs, slope, mask, COMPLEX)


def test_softplus_is_accurate():
    """To four roundings, and the identity above 20."""
    x = torch.linspace(-80, 100, 1 << 14, device=DEVICE)
    results, wide = evaluate(x)
    exact = wide.clamp(min=0) + torch.log1p(torch.exp(-wide.abs()))
    # and the rounding of x log2(e)
    bound = (4 + wide.abs()) * torch.finfo(torch.float32).eps
    assert ((results['softplus'] - exact).abs() <= bound * exact).all()
    assert torch.equal(results['softplus'][x > 20], x[x > 20])


@pytest.mark.parametrize(
    ('largest', 'slack'), [(10.0, 0.0), (1e5, 1e-3), (1e6, 0.5)]
)
def test_angles_are_accurate(largest, slack):
    """Closer than half a rounding of the angle, which a scan cannot avoid.

    Multiples of a quarter turn, where one of both is nearly zero, included.
    """
    x = torch.linspace(-largest, largest, 1 << 14, device=DEVICE)
    quarters = (x / (torch.pi / 2)).round() * (torch.pi / 2)
    results, wide = evaluate(torch.cat([x, quarters]))
    bound = torch.finfo(torch.float32).eps * (1 + slack * wide.abs())
    for name, function in (('cos', torch.cos), ('sin', torch.sin)):
        error = (results[name] - function(wide)).abs()
        assert (error <= bound).all(), name


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize(
    'size', [0.0, 1e-30, 1e-4, 0.1, 0.9999, 1.0, 2.5, 6.0]
)
def test_phi1_is_accurate(size, complex_a):
    """Value and derivative, near zero and on both sides of the switch."""
    turn = torch.linspace(-torch.pi, torch.pi, 256 if complex_a else 2)
    x = torch.polar(torch.full_like(turn, size), turn)
    x = (x if complex_a else x.real).to(DEVICE)
    x = torch.cat([x, -x])
    parts = torch.view_as_real(x) if complex_a else x
    phi1, slope = torch.empty_like(parts), torch.empty_like(parts)
    _phi1_kernel[(1,)](parts, phi1, slope, complex_a, x.numel())
    wide = x.to(torch.complex128)
    exact_phi1, exact_slope = torch.ones_like(wide), torch.ones_like(wide) / 2
    for k in range(1, 40):
        exact_phi1 += wide**k / float(math.factorial(k + 1))
        exact_slope += (k + 1) * wide**k / float(math.factorial(k + 2))
    for result, exact in ((phi1, exact_phi1), (slope, exact_slope)):
        value = torch.view_as_complex(result) if complex_a else result
        error = ((value - exact).abs() / exact.abs()).max()
        assert error <= 1e-6


class LargestTensor(TorchDispatchMode):
    """Remember the most bytes that a result had."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return out


def test_no_tensor_with_states_of_all_tokens():
    """Memory for the states of a chunk, and of the chunks' borders."""
    inputs = make_inputs(1, 65, 32, 16)
    with LargestTensor() as largest:
        run(inputs)
    assert largest.nbytes == backend.CHUNK * 32 * 16 * 4


@pytest.mark.parametrize('name', ['u', 'A', 'delta_bias'])
def test_float64_is_refused(name):
    inputs = make_inputs()
    inputs[name] = inputs[name].double()
    with pytest.raises(TypeError, match=r"float64.*backend='cpu'"):
        backend.forward(*inputs.values(), True, False, 'euler', False)


def test_too_many_states_are_refused():
    inputs = make_inputs(length=1, state=65)
    with pytest.raises(ValueError, match=r"64 states.*backend='cpu'"):
        backend.forward(*inputs.values(), True, False, 'euler', False)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    inputs = {name: x.cpu() for name, x in make_inputs().items()}
    monkeypatch.setattr(triton.knobs.runtime, 'interpret', False)
    with pytest.raises(RuntimeError, match='needs a GPU'):
        backend.forward(*inputs.values(), True, False, 'euler', False)


def ahead_of_time(kernel, complex_a, zoh, **specialized):
    """A kernel as it is launched for bfloat16 inputs and one group."""
    block_n, block_d = backend.tile_shape(
        specialized.get('state', 16), complex_a
    )
    constants = dict(
        groups=1,
        CONSTANT_B=False,
        CONSTANT_C=False,
        SOFTPLUS=True,
        REVERSE=False,
        ZOH=zoh,
        COMPLEX=complex_a,
        CHUNK=backend.CHUNK,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )
    constants |= {
        name: value
        for name, value in specialized.items()
        if name in kernel.arg_names
    }
    half = {'u_ptr', 'delta_ptr'}
    if not complex_a:
        half |= {'B_ptr', 'C_ptr'}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        elif name.endswith('_ptr'):
            signature[name] = '*bf16' if name in half else '*fp32'
        else:
            signature[name] = 'i32'
        if signature[name] != 'constexpr' and name != 'length':
            attributes[i,] = [['tt.divisibility', 16]]
    return triton.compiler.ASTSource(kernel, signature, constants, attributes)


def resources(cubin):
    """Registers and bytes of stack of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run(
            [tool, '-res-usage', file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    used = dict(x.split(':') for x in report.split() if x.count(':') == 1)
    return int(used['REG']), int(used['STACK'])


def compile_all():
    """Registers and stack of the table's kernels, as JSON on stdout."""
    found = {}
    for name, architectures in REGISTERS.items():
        which, kind, b_disc = name.split()
        kernel = getattr(kernels, f'_scan_{which}_kernel')
        source = ahead_of_time(kernel, kind == 'complex', b_disc == 'zoh')
        options = {
            'fwd': backend.FORWARD_OPTIONS,
            'bwd': backend.BACKWARD_OPTIONS,
        }[which]
        for architecture in architectures:
            target = triton.backends.compiler.GPUTarget(
                'cuda', architecture, 32
            )
            built = triton.compile(source, target=target, options=options)
            found[f'{name} {architecture}'] = resources(built.asm['cubin'])
    for kernel in (kernels._scan_fwd_kernel, kernels._scan_bwd_kernel):
        for complex_a in (False, True):
            source = ahead_of_time(kernel, complex_a, True, **SMALLEST)
            target = triton.backends.compiler.GPUTarget('cuda', 90, 32)
            triton.compile(source, target=target)
    json.dump(found, sys.stdout)


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
    """What ``compile_all`` finds: interpreted kernels cannot be compiled."""
    environment = dict(os.environ)
    environment.pop('TRITON_INTERPRET', None)
    environment['TRITON_CACHE_DIR'] = str(tmp_path_factory.mktemp('triton'))
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compiles_without_spills(compiled):
    """For Ampere, Hopper and Blackwell."""
    assert compiled
    assert {
        name: stack for name, (_, stack) in compiled.items() if stack
    } == {}


@pytest.mark.skipif(triton.__version__ != '3.6.0', reason='another compiler')
def test_registers_are_as_recorded(compiled):
    found = {name: registers for name, (registers, _) in compiled.items()}
    recorded = {
        f'{name} {architecture}': registers
        for name, architectures in REGISTERS.items()
        for architecture, registers in architectures.items()
    }
    assert found == recorded


if __name__ == '__main__':
    compile_all()


@pytest.mark.parametrize('complex_a', [False, True])
def test_public_function(complex_a):
    """By its name, in the public layout, and counted."""
    inputs = make_inputs(complex_a=complex_a)
    u, delta, A, B, C, D, bias = inputs.values()
    results = []
    for name in ('reference', 'triton'):
        leaves = [x.clone().requires_grad_() for x in (u, delta, A, B, C)]
        with FlopCounterMode(display=False) as counter:
            y = selective_scan(
                *leaves,
                D,
                delta_bias=bias,
                delta_softplus=True,
                channels_last=True,
                backend=name,
            )
        y.square().sum().backward()
        results.append([y, *(x.grad for x in leaves)])
    shapes = (tuple(u.shape), tuple(A.shape))
    assert counter.get_total_flops() == scan_flops(*shapes, complex_a)
    for actual, wanted in zip(*results, strict=True):
        error = (actual - wanted).abs().max()
        assert error <= TOLERANCE * wanted.abs().max()
