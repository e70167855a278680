"""The fused C++ path of the ``cpu`` backend, against the definition."""

import multiprocessing
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmstabvim.ops import (
    native,
    selective_scan,
    selective_scan_directions,
)
from mmstabvim.ops.selective_scan import ScanInputs, cpu, fused
from mmstabvim.ops.selective_scan.discretization import phi1_derivative
from mmstabvim.ops.selective_scan.reference import scan_ref

pytestmark = pytest.mark.usefixtures('one_thread')

TOLERANCE = 3e-6
"""Of an array's largest magnitude: what goldens of float32 may differ by."""

EPS = torch.finfo(torch.float32).eps
ARGUMENTS = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')

# complex A, b_disc
MODES = {
    'real-euler': (False, 'euler'),
    'real-zoh': (False, 'zoh'),
    'complex-euler': (True, 'euler'),
    'complex-zoh': (True, 'zoh'),
}


@pytest.fixture
def built():
    """Skips where the fused path cannot be built."""
    if fused.library() is None:
        pytest.skip('no C++ compiler that can build the fused path')


@pytest.fixture
def calls(built, monkeypatch):
    """Names of the fused functions as the backend calls them."""
    monkeypatch.delenv(native.ENVIRONMENT_VARIABLE, raising=False)
    names = []

    def spy(name):
        function = getattr(fused, name)

        def called(*args):
            names.append(name)
            return function(*args)

        monkeypatch.setattr(fused, name, called)

    spy('forward')
    spy('backward')
    return names


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def make_inputs(
    mode='real-euler',
    reverse=(False,),
    batch=2,
    length=37,
    dim=20,
    state=16,
    groups=(1, 1),
    constant='',
    absent=(),
    softplus=True,
):
    """Inputs of the scan, float32 or complex64, reproducible."""
    complex_a, b_disc = MODES[mode]
    generator = torch.Generator().manual_seed(length * 1000 + dim + state)
    directions = len(reverse)

    def normal(*shape):
        return torch.randn(directions, *shape, generator=generator)

    def wide(*shape):
        if not complex_a:
            return normal(*shape)
        return torch.complex(normal(*shape), normal(*shape))

    def matrix(name, groups):
        if name in constant:
            return wide(dim, state)
        return wide(batch, length, groups, state)

    A = -2 * torch.rand(directions, dim, state, generator=generator)
    if complex_a:
        A = torch.complex(A, normal(dim, state))
    delta = normal(batch, length, dim) - 1
    return ScanInputs(
        u=normal(batch, length, dim),
        delta=delta if softplus else delta.abs(),
        A=A,
        B=matrix('B', groups[0]),
        C=matrix('C', groups[1]),
        D=None if 'D' in absent else normal(dim),
        delta_bias=None if 'delta_bias' in absent else normal(dim),
        delta_softplus=softplus,
        reverse=tuple(reverse),
        b_disc=b_disc,
    )


def convert(inputs, real):
    """The same inputs with dtypes ``real`` and its complex counterpart."""
    tensors = (
        None
        if x is None
        else x.to(real.to_complex() if x.is_complex() else real)
        for x in inputs.tensors
    )
    return ScanInputs(*tensors, *inputs[7:])


def seeds(inputs):
    """Gradients of y and of the last state."""
    generator = torch.Generator().manual_seed(1)
    u, A = inputs.u, inputs.A
    dy = torch.randn(u.shape, generator=generator)
    shape = (*u.shape[:2], u.shape[3], A.shape[2])
    dtype = torch.complex64 if A.is_complex() else torch.float32
    return dy, torch.randn(shape, generator=generator, dtype=dtype)


def run(inputs, dy=None):
    """Both outputs and the gradient of every input, by name."""
    own_dy, dlast = seeds(inputs)
    dy = own_dy if dy is None else dy
    y, last, borders = fused.forward(inputs, True, cpu.CHUNK)
    grads = fused.backward(dy, dlast, borders, inputs, cpu.CHUNK)
    return {'y': y, 'last': last, **by_name(inputs, grads)}


def by_name(inputs, grads):
    """Gradients of the inputs that are there; checks the others' shape."""
    named = {}
    triples = zip(ARGUMENTS, inputs.tensors, grads, strict=True)
    for name, x, grad in triples:
        if x is None:
            assert grad.shape == (0,)
        else:
            named[f'd{name}'] = grad
    return named


def run_ref(inputs, dtype=torch.float64):
    """:func:`run` with the definition and autograd."""
    dy, dlast = seeds(inputs)
    inputs = convert(inputs, dtype)
    leaves = [x for x in inputs.tensors if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y, last = scan_ref(inputs)
    torch.autograd.backward([y, last], [dy.to(y.dtype), dlast.to(last.dtype)])
    grads = (None if x is None else x.grad for x in inputs.tensors)
    names = zip(ARGUMENTS, grads, strict=True)
    named = {f'd{name}': grad for name, grad in names if grad is not None}
    return {'y': y.detach(), 'last': last.detach(), **named}


def assert_close(actual, exact, tolerance=TOLERANCE):
    assert actual.keys() == exact.keys()
    for name, wanted in exact.items():
        assert actual[name].shape == wanted.shape, name
        error = (actual[name] - wanted).abs().max()
        bound = tolerance * wanted.abs().max()
        assert error <= bound, f'{name}: {error:.2e} > {bound:.2e}'


def assert_equal(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(actual[name], x), name


def check(inputs):
    """The fused path agrees with the definition in float64."""
    assert fused.supports(inputs)
    # angles are rounded too
    tolerance = 2 * TOLERANCE if inputs.A.is_complex() else TOLERANCE
    assert_close(run(inputs), run_ref(inputs), tolerance)


@pytest.mark.parametrize('case', range(1, 19))
def test_goldens(case, golden, calls):
    """Every golden case: values and gradients of the official scan."""
    archive = golden('selective_scan.npz')
    names = (*ARGUMENTS, 'z')
    data = {
        key.split('/')[1]: torch.from_numpy(archive[key])
        for key in archive.files
        if key.startswith(f'case{case:02}/') and 'description' not in key
    }
    given = {n: data[n].requires_grad_() for n in names if n in data}
    out, last = selective_scan(
        **given,
        delta_softplus=bool(data['delta_softplus']),
        return_last_state=True,
        backend='cpu',
    )
    (out * data['dout']).sum().backward()
    assert calls == ['forward', 'backward']
    actual = {'out_f64': out.detach(), 'last_state_f64': last.detach()}
    actual |= {f'grad_{name}': x.grad for name, x in given.items()}
    assert_close(actual, {name: data[name] for name in actual})


SIZES = [
    (1, 1),
    (1, 17),
    (2, 3),
    (15, 33),
    (37, 16),
    (63, 100),
    (64, 17),
    (65, 96),
    (197, 3),
    (197, 100),
]


@pytest.mark.parametrize(('length', 'dim'), SIZES)
def test_lengths_and_dims(length, dim, mode, built):
    check(make_inputs(mode, (False, True), length=length, dim=dim, state=4))


@pytest.mark.parametrize('state', [1, 2, 3, 5, 7, 8, 16, 33, 64])
def test_states(state, mode, built):
    check(make_inputs(mode, (False, True), length=33, dim=9, state=state))


@pytest.mark.parametrize('constant', ['', 'B', 'C', 'BC'])
@pytest.mark.parametrize(
    'groups', [(1, 1), (2, 2), (1, 3), (3, 1)], ids='{0[0]},{0[1]}'.format
)
def test_matrices(constant, groups, mode, built):
    """Constant or per token, per group or shared by all groups."""
    check(
        make_inputs(
            mode,
            (True, False),
            length=18,
            dim=42,
            state=5,
            groups=groups,
            constant=constant,
        )
    )


@pytest.mark.parametrize(
    'absent', [('D',), ('delta_bias',), ('D', 'delta_bias')], ids=str
)
def test_absent_inputs(absent, mode, built):
    check(make_inputs(mode, absent=absent, state=4))


def test_without_softplus(mode, built):
    check(make_inputs(mode, absent=('delta_bias',), softplus=False))


def test_growing_states(mode, built):
    """Eigenvalues of either sign, as a free parametrization has them."""
    inputs = make_inputs(mode, length=20, state=4)
    check(inputs._replace(A=-inputs.A))


@pytest.mark.parametrize('batch', [1, 3, 40])
def test_batches(batch, mode, built, two_threads):
    """One slab and many slabs of channels."""
    check(
        make_inputs(
            mode, (False, True), batch=batch, length=17, dim=100, state=3
        )
    )


def test_large_angles(built):
    """No worse than the definition in float32, which rounds angles too."""
    inputs = make_inputs('complex-zoh', length=65, state=4)
    inputs.A.imag *= 1000
    exact = run_ref(inputs)
    plain, actual = run_ref(inputs, torch.float32), run(inputs)
    for name, wanted in exact.items():
        lost = (plain[name] - wanted).abs().max()
        bound = 2 * lost + 2 * EPS * wanted.abs().max()
        assert (actual[name] - wanted).abs().max() <= bound, name


# --------------------------------------------------- directions and layouts


def test_directions_do_not_meet(mode, built, two_threads):
    """Bitwise what each direction gives alone."""
    reverse = (False, True, True)
    inputs = make_inputs(
        mode, reverse, batch=4, length=20, dim=100, groups=(2, 1)
    )
    dy, _ = seeds(inputs)
    together = fused.forward(inputs, True, cpu.CHUNK)
    grads = fused.backward(dy, None, together[2], inputs, cpu.CHUNK)
    for k in range(len(reverse)):
        tensors = (x[k : k + 1] for x in inputs.tensors)
        one = ScanInputs(*tensors, True, reverse[k : k + 1], inputs.b_disc)
        alone = fused.forward(one, True, cpu.CHUNK)
        for x, wanted in zip(together, alone, strict=True):
            assert torch.equal(x[k], wanted[0])
        wanted = fused.backward(dy[k : k + 1], None, alone[2], one, cpu.CHUNK)
        for x, wanted_grad in zip(grads, wanted, strict=True):
            assert torch.equal(x[k], wanted_grad[0])


def test_directions_together(mode, calls):
    """The public function hands all directions over at once."""
    inputs = make_inputs(mode, (False, True), state=4)
    leaf = inputs.u.clone().requires_grad_()
    y = selective_scan_directions(
        leaf, *inputs[1:7], True, inputs.reverse, inputs.b_disc, 'cpu'
    )
    dy, _ = seeds(inputs)
    y.backward(dy)
    assert calls == ['forward', 'backward']
    wide = convert(inputs, torch.float64)
    exact_leaf = wide.u.requires_grad_()
    exact, _ = scan_ref(wide)
    exact.backward(dy.double())
    assert_close(
        {'y': y.detach(), 'du': leaf.grad},
        {'y': exact.detach(), 'du': exact_leaf.grad},
    )


def test_shared_by_directions(mode, built):
    """Directions may be views of one tensor, and so may their gradients."""
    inputs = make_inputs(mode, (False, True), state=4)
    once = {
        name: getattr(inputs, name)[:1].expand_as(getattr(inputs, name))
        for name in ('u', 'B', 'D')
    }
    views = inputs._replace(**once)
    copies = inputs._replace(**{k: x.clone() for k, x in once.items()})
    dy = seeds(inputs)[0][:1].expand_as(inputs.u)
    assert_equal(run(views, dy), run(copies, dy.clone()))
    halves = (x._replace(u=x.u.bfloat16()) for x in (views, copies))
    assert_equal(*(run(x, dy) for x in halves))


def strided(x, axes):
    """The same values, every second element of a larger tensor."""
    larger = x.new_full(
        [2 * n if i in axes else n for i, n in enumerate(x.shape)], 9
    )
    view = larger[
        tuple(slice(None, None, 2 if i in axes else 1) for i in range(x.dim()))
    ]
    view.copy_(x)
    return view


@pytest.mark.parametrize('axes', [(0,), (1,), (2,), (3,), (0, 1, 2)], ids=str)
def test_non_contiguous(axes, mode, built):
    """Strides of direction, batch, tokens and channels are respected."""
    inputs = make_inputs(mode, (False, True), groups=(2, 2), state=4)
    views = (strided(x, axes) for x in inputs.tensors)
    assert_equal(run(ScanInputs(*views, *inputs[7:])), run(inputs))


@pytest.mark.parametrize('state', [1, 4])
def test_pending_conjugation(state, built):
    """``conj()`` alone touches no memory; nor does the sign of ``imag``.

    With one state, (dim, state) has the inner layout as it is.
    """
    inputs = make_inputs('complex-euler', state=state)
    changed = {n: getattr(inputs, n).conj() for n in 'ABC'}
    changed['D'] = inputs.A[..., 0].conj().imag
    views = inputs._replace(**changed)
    assert views.D.is_neg()
    assert views.B.is_conj()
    copies = {
        k: x.resolve_conj().resolve_neg().clone() for k, x in changed.items()
    }
    assert_equal(run(views), run(inputs._replace(**copies)))


@pytest.mark.parametrize('layout', ['by channel', 'one number'])
def test_layout_of_gradient(layout, built):
    """The gradient of the output may have any layout."""
    inputs = make_inputs(state=4)
    dy, _ = seeds(inputs)
    if layout == 'by channel':
        view = dy.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        view = dy[:1, :1, :1, :1].expand_as(dy)
    assert_equal(run(inputs, view), run(inputs, view.contiguous()))


@pytest.mark.parametrize('batch', [1, 5])
def test_same_bits(batch, mode, built, two_threads):
    """From run to run and for every number of threads."""
    inputs = make_inputs(
        mode, (False, True), batch=batch, length=65, dim=100, groups=(2, 1)
    )
    first = run(inputs)
    assert_equal(run(inputs), first)
    torch.set_num_threads(1)
    assert_equal(run(inputs), first)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype, mode, built):
    """As if the real inputs had been converted first."""
    inputs = make_inputs(mode)
    half = inputs._replace(
        **{
            name: x.to(dtype)
            for name, x in zip(ARGUMENTS, inputs.tensors, strict=True)
            if not x.is_complex()
        }
    )
    assert fused.supports(half)
    assert_equal(run(half), run(convert(half, torch.float32)))


def test_real_matrices_of_a_complex_scan(built):
    """Stand for complex ones; so do their gradients."""
    inputs = make_inputs('complex-euler', state=4)
    real = inputs._replace(B=inputs.B.real, C=inputs.C.real)
    as_complex = real._replace(
        B=real.B.to(torch.complex64), C=real.C.to(torch.complex64)
    )
    assert_equal(run(real), run(as_complex))


@pytest.mark.parametrize('first', ['fused', 'torch'])
def test_mixes_with_the_torch_variant(first, mode, built, monkeypatch):
    """Stored states have one meaning: either variant continues the other."""
    inputs = make_inputs(mode, (False, True), groups=(2, 1), length=70)
    dy, dlast = seeds(inputs)
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, '0')
    if first == 'fused':
        y, last, borders = fused.forward(inputs, True, cpu.CHUNK)
        grads = cpu.backward(dy, dlast, borders, inputs)
    else:
        y, last, borders = cpu.forward(inputs, True)
        grads = fused.backward(dy, dlast, borders, inputs, cpu.CHUNK)
    mixed = {'y': y, 'last': last, **by_name(inputs, grads)}
    assert_close(mixed, run_ref(inputs))


# ------------------------------------------------------------------ accuracy


def decay(x):
    """``exp(x)``, read off a scan: a state of 1, then one step."""
    shape = (1, 1, 2, x.numel())
    # infinite times zero is NaN: the first step must not overflow
    delta = torch.tensor([2.0**-110, 1.0])[None, None, :, None].expand(shape)
    u = torch.tensor([2.0**110, 0.0])[None, None, :, None].expand(shape)
    matrix = torch.ones(1, 1, 2, 1, 1)
    inputs = ScanInputs(
        u, delta, x[None, :, None], matrix, matrix, None, None,
        False, (False,), 'euler',
    )  # fmt: skip
    return fused.forward(inputs, False, cpu.CHUNK)[1].flatten()


def check_decay():
    x = torch.linspace(-87, 88, 100_003)
    exact = x.double().exp()
    error = (decay(x) - exact).abs() / exact
    # 1.5 ulp, and the rounding of x log2(e)
    bound = (1.5 + x.abs()) * EPS
    assert (error <= bound).all()
    ends = torch.tensor([-1e30, -1e4, -110.0, 0.0, 90.0, 1e4, 1e30])
    assert decay(ends).tolist() == [0, 0, 0, 1, *[float('inf')] * 3]
    assert decay(torch.tensor([float('-inf')])).tolist() == [0]
    assert decay(torch.tensor([float('nan')])).isnan().all()


def test_decay_is_accurate(built):
    check_decay()


def check_angles():
    near = torch.linspace(-4, 4, 100_003)
    # also multiples of pi / 2, where the reduction cancels
    turns = (torch.arange(-2500.0, 2500.0) * torch.pi / 2).float()
    x = torch.cat([near, 1000 * near, turns])
    error = decay(torch.complex(torch.zeros_like(x), x))
    error = error - torch.polar(
        torch.ones_like(x, dtype=torch.double), x.double()
    )
    assert error.abs().max() <= 1.6e-7
    assert decay(torch.zeros(1) * 1j).tolist() == [1]


def test_angles_are_accurate(built):
    check_angles()


def test_far_angles_are_accurate(built):
    """As far as the rounding of the angle itself: to float32's limit."""
    x = torch.logspace(3.5, 38, 997).repeat(2)
    x[997:] *= -1
    actual = decay(torch.complex(torch.zeros_like(x), x))
    exact = torch.polar(torch.ones_like(x, dtype=torch.double), x.double())
    assert (actual - exact).abs().max() <= 1.6e-7
    for value in (float('inf'), float('nan')):
        assert decay(torch.tensor([complex(0, value)])).isnan().all()


def hold(x):
    """phi1(x) and its derivative, read off one step of a scan."""
    one = torch.ones(1, 1, 1, x.numel())
    matrix = torch.ones(1, x.numel(), 1, dtype=x.dtype)
    inputs = ScanInputs(
        one, one, x[None, :, None], matrix, matrix, None, None,
        False, (False,), 'zoh',
    )  # fmt: skip
    _, last, borders = fused.forward(inputs, True, cpu.CHUNK)
    grads = fused.backward(
        0 * one, torch.ones_like(last), borders, inputs, cpu.CHUNK
    )
    return last.flatten(), grads[2].flatten().conj()


def check_hold(x):
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    near = wide.abs() < 1e-3
    safe = torch.where(near, 1, wide)
    series = 1 + wide / 2 + wide**2 / 6 + wide**3 / 24 + wide**4 / 120
    value = torch.where(near, series, torch.expm1(safe) / safe)
    actual, slope = hold(x)
    # 3 ulp, and the rounding of x log2(e)
    bound = (3 + x.abs()) * EPS
    assert ((actual - value).abs() <= bound * value.abs()).all()
    # where the power series ends three bits cancel
    exact = phi1_derivative(wide)
    assert ((slope - exact).abs() <= (8 + bound) * EPS * exact.abs()).all()


def test_zero_order_hold_is_accurate(built):
    """Relative errors: near 0, where the quotient cancels, and far from it."""
    near = torch.logspace(-38, 0, 10_007)
    check_hold(torch.cat([near, -near, torch.zeros(1)]))
    check_hold(torch.linspace(-8, 8, 30_011))


def test_complex_zero_order_hold_is_accurate(built):
    angle = torch.linspace(0, 2 * torch.pi, 101)[:, None]
    size = torch.cat([torch.zeros(1), torch.logspace(-37, 0.6, 301)])
    check_hold(torch.polar(*torch.broadcast_tensors(size, angle)).flatten())


def test_softplus_is_accurate(built):
    """Value and slope to 4 roundings, the identity above 20."""
    x = torch.cat([torch.linspace(-86, 100, 100_003), torch.zeros(1)])
    delta = x[None, None, None]
    one, A = torch.ones_like(delta), torch.zeros(1, x.numel(), 1)
    matrix = torch.ones(1, 1, 1, 1, 1)
    inputs = ScanInputs(
        one, delta, A, matrix, matrix, None, None, True, (False,), 'euler'
    )
    y, _, borders = fused.forward(inputs, True, cpu.CHUNK)
    _, grad, *_ = fused.backward(one, None, borders, inputs, cpu.CHUNK)
    y, grad, wide = y.flatten(), grad.flatten(), x.double()
    # log1p(exp(x)) itself: torch's float64 softplus rounds exp(-20) away
    exact = wide.clamp(min=0) + torch.log1p(torch.exp(-wide.abs()))
    assert ((y - exact).abs() <= 4 * EPS * exact).all()
    slope = torch.sigmoid(wide)
    assert ((grad - slope).abs() <= 4 * EPS * slope).all()
    above = x > 20
    assert torch.equal(y[above], x[above])


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('name', ARGUMENTS)
def test_not_finite_stays_visible(name, value, mode, built):
    """Outputs and gradients are finite only where the definition's are."""
    inputs = make_inputs(mode, length=20, dim=5, state=2)
    x = getattr(inputs, name)
    x.view(-1)[x.numel() // 2] = value
    actual = run(inputs)
    exact = run_ref(inputs, torch.float32)
    for key, wanted in exact.items():
        visible = ~wanted.isfinite()
        assert (~actual[key].isfinite())[visible].all(), key
        if value != value:
            assert torch.equal(~actual[key].isfinite(), visible), key


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='x86 flags')
@pytest.mark.parametrize('flag', ['-mno-avx512f', '-mno-avx'])
def test_other_vector_lengths(flag, built, monkeypatch, empty_cache, messages):
    """The portable code, with eight and with four lanes."""
    monkeypatch.setattr(native, 'FLAGS', (*native.FLAGS, flag))
    for mode in MODES:
        check(make_inputs(mode, (False, True), length=65, dim=21, state=6))
    check_decay()
    check_angles()
    check_hold(torch.linspace(-8, 8, 30_011))
    assert not messages
    assert len(list(empty_cache.glob('*.so'))) == 1


MEMORY = """
import sys
from pathlib import Path
import torch
from mmstabvim.ops.selective_scan import fused
sys.path.insert(0, sys.argv[1])
from test_fused_scan import make_inputs, seeds

def memory(field):
    rows = Path('/proc/self/status').read_text().splitlines()
    row = next(x for x in rows if x.startswith(field + ':'))
    return float(row.split()[1]) / 1024

torch.set_num_threads(2)
for mode in ('real-euler', 'complex-zoh'):
    for batch in (1, 32):  # once to load and build everything
        inputs = make_inputs(mode, batch=batch, length=197, dim=384)
        dy, _ = seeds(inputs)
        Path('/proc/self/clear_refs').write_text('5')  # forget the peak
        before = memory('VmRSS')
        y, _, borders = fused.forward(inputs, True, 16)
        grads = fused.backward(dy, None, borders, inputs, 16)
        used = memory('VmHWM') - before
        del y, borders, grads
    print(used)
"""


@pytest.mark.skipif(
    not Path('/proc/self/clear_refs').exists(), reason="Linux's /proc"
)
def test_memory(built):
    """At most 64 MB more at the peak, outputs and gradients included."""
    done = subprocess.run(
        [sys.executable, '-c', MEMORY, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    used = [float(line) for line in done.stdout.split()]
    # below what y, du and ddelta take, the measurement would be broken
    assert all(25 <= x <= 64 for x in used), used


# ---------------------------------------------------------------- the choice


def refuse(inputs):
    assert not fused.supports(inputs)


def test_leaves_the_rest_to_torch(calls):
    inputs = make_inputs(groups=(2, 2))
    assert fused.supports(inputs)
    refuse(convert(inputs, torch.float64))
    refuse(inputs._replace(u=inputs.u.double()))
    refuse(inputs._replace(B=inputs.B.to(torch.complex64)))
    refuse(inputs._replace(u=inputs.u.to('meta')))
    y, _, _ = cpu.forward(convert(inputs, torch.float64), False)
    assert y.dtype == torch.float64
    assert not calls


def scan(inputs, **options):
    """The public function, one direction."""
    u, delta, A, B, C, D, bias = (x[0] for x in inputs.tensors)
    return selective_scan(
        u, delta, A, B, C, D,
        delta_bias=bias,
        delta_softplus=True,
        channels_last=True,
        backend='cpu',
        **options,
    )  # fmt: skip


def test_environment_variable_turns_it_off(calls, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, '0')
    inputs = make_inputs()
    exact = run_ref(inputs)['y'][0]
    assert_close({'y': scan(inputs)}, {'y': exact})
    assert not calls


def test_falls_back(calls, no_compiler, messages):
    """The same numbers without a compiler, and one line in the log."""
    inputs = make_inputs()
    exact = run_ref(inputs)['y'][0]
    for _ in range(2):
        assert_close({'y': scan(inputs)}, {'y': exact})
    assert not calls
    assert len(messages) == 1


def _scan_in_child(inputs, wanted):
    raise SystemExit(0 if torch.equal(scan(inputs), wanted) else 3)


def test_runs_after_a_fork(calls, two_threads):
    """The parent's OpenMP threads are missing in a forked child."""
    inputs = make_inputs(batch=4)
    y = scan(inputs)
    assert calls == ['forward']
    context = multiprocessing.get_context('fork')
    child = context.Process(target=_scan_in_child, args=(inputs, y))
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs
    assert child.exitcode == 0
