"""The C++ kernels of the scan against the definition."""

import multiprocessing
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_tester import (
    SCAN_DIRECTIONS,
    assert_equal,
    convert,
    make_seed,
)

from mmstabvim.ops import (
    native,
    selective_scan,
    selective_scan_directions,
)
from mmstabvim.ops.selective_scan import ScanInputs, cpu, fused
from mmstabvim.ops.selective_scan.discretization import phi1_derivative

pytestmark = pytest.mark.usefixtures('one_thread')

EPS = torch.finfo(torch.float32).eps
TENSORS = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')

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


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def make_inputs(complex_a=False, **sizes):
    """Inputs by name, of two samples unless told."""
    defaults = dict(batch=2, length=37, dim=20, state=16, directions=1)
    return SCAN_DIRECTIONS.make(complex_a=complex_a, **defaults | sizes)


def make(mode='real-euler', reverse=(False,), **sizes):
    """Inputs by name, and options of the scan."""
    complex_a, b_disc = MODES[mode]
    inputs = make_inputs(complex_a, directions=len(reverse), **sizes)
    return inputs, dict(reverse=reverse, b_disc=b_disc)


def given(inputs, delta_softplus=True, **options):
    return ScanInputs(**inputs, delta_softplus=delta_softplus, **options)


def run(inputs, options, seeds=None):
    """Both outputs and the gradient of every input, by name."""
    return SCAN_DIRECTIONS.run(inputs, 'fused', seeds=seeds, **options)


def check(inputs, options):
    """The kernels agree with the definition in float64."""
    # angles are rounded too
    tolerance = 6e-6 if inputs['A'].is_complex() else 3e-6
    SCAN_DIRECTIONS.check(inputs, 'fused', tolerance, **options)


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
    check(*make(mode, (False, True), length=length, dim=dim, state=4))


@pytest.mark.parametrize('state', [1, 2, 3, 5, 7, 8, 16, 33, 64])
def test_states(state, mode, built):
    check(*make(mode, (False, True), length=33, dim=9, state=state))


@pytest.mark.parametrize('constant', ['', 'B', 'C', 'BC'])
@pytest.mark.parametrize(
    'groups', [(1, 1), (2, 2), (1, 3), (3, 1)], ids='{0[0]},{0[1]}'.format
)
def test_matrices(constant, groups, mode, built):
    """Constant or per token, per group or shared by all groups."""
    sizes = dict(length=18, dim=42, state=5, groups=groups)
    check(*make(mode, (True, False), constant=constant, **sizes))


@pytest.mark.parametrize(
    'absent', [('D',), ('delta_bias',), ('D', 'delta_bias')], ids=str
)
def test_absent_inputs(absent, mode, built):
    check(*make(mode, absent=absent, state=4))


def test_without_softplus(mode, built):
    sizes = dict(absent=('delta_bias',), softplus=False)
    inputs, options = make(mode, **sizes)
    check(inputs, options | dict(delta_softplus=False))


def test_growing_states(mode, built):
    """Eigenvalues of either sign, as a free parametrization has them."""
    inputs, options = make(mode, length=20, state=4)
    check(inputs | {'A': -inputs['A']}, options)


@pytest.mark.parametrize('batch', [1, 3, 40])
def test_batches(batch, mode, built, two_threads):
    """One slab and many slabs of channels."""
    sizes = dict(batch=batch, length=17, dim=100, state=3)
    check(*make(mode, (False, True), **sizes))


def test_large_angles(built):
    """No worse than the definition in float32, which rounds angles too."""
    inputs, options = make('complex-zoh', length=65, state=4)
    inputs['A'].imag *= 300
    SCAN_DIRECTIONS.check(inputs, 'fused', 0.0, **options)


# --------------------------------------------------- directions and layouts


def test_directions_do_not_meet(mode, built, two_threads):
    """Bitwise what each direction gives alone."""
    reverse = (False, True, True)
    sizes = dict(batch=4, length=20, dim=100, groups=(2, 1))
    inputs, options = make(mode, reverse, **sizes)
    outputs = SCAN_DIRECTIONS.function(**inputs, backend='fused', **options)
    seeds = {name: make_seed(y) for name, y in outputs.items()}
    together = run(inputs, options, seeds)
    for k in range(len(reverse)):
        one, seed = (
            {name: x[k : k + 1] for name, x in arrays.items()}
            for arrays in (inputs, seeds)
        )
        alone = run(one, options | {'reverse': reverse[k : k + 1]}, seed)
        assert_equal({n: x[k : k + 1] for n, x in together.items()}, alone)


def test_shared_by_directions(mode, built):
    """Directions may be views of one tensor, and so may their gradients."""
    inputs, options = make(mode, (False, True), state=4)
    once = {n: inputs[n][:1].expand_as(inputs[n]) for n in ('u', 'B', 'D')}
    copies = {name: x.clone() for name, x in once.items()}
    for dtype in (torch.float32, torch.bfloat16):
        one, each = (convert(inputs | x, dtype) for x in (once, copies))
        assert_equal(run(one, options), run(each, options))


@pytest.mark.parametrize('state', [1, 4])
def test_pending_conjugation(state, built):
    """``conj()`` alone touches no memory; nor does the sign of ``imag``.

    With one state, (dim, state) has the inner layout as it is.
    """
    inputs, options = make('complex-euler', state=state)
    changed = {n: inputs[n].conj() for n in 'ABC'}
    changed['D'] = inputs['A'][..., 0].conj().imag
    assert changed['D'].is_neg()
    assert changed['B'].is_conj()
    copies = {
        k: x.resolve_conj().resolve_neg().clone() for k, x in changed.items()
    }
    assert_equal(run(inputs | changed, options), run(inputs | copies, options))


def test_gradient_by_channel(built):
    """The gradient of the output may have any layout."""
    inputs, options = make(state=4)
    outputs = SCAN_DIRECTIONS.function(**inputs, backend='fused', **options)
    seeds = {name: make_seed(y) for name, y in outputs.items()}
    view = seeds['y'].mT.contiguous().mT
    assert_equal(
        run(inputs, options, seeds | {'y': view}), run(inputs, options, seeds)
    )


@pytest.mark.parametrize('batch', [1, 5])
def test_threads_change_no_bit(batch, mode, built, two_threads):
    sizes = dict(batch=batch, length=65, dim=100, groups=(2, 1))
    inputs, options = make(mode, (False, True), **sizes)
    first = run(inputs, options)
    torch.set_num_threads(1)
    assert_equal(run(inputs, options), first)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype, mode, built):
    """As if the real inputs had been converted first; rounded once."""
    inputs, options = make(mode)
    half = convert(inputs, dtype)
    actual = run(half, options)
    single = run(convert(half, torch.float32), options)
    assert_equal(actual, {k: x.to(actual[k].dtype) for k, x in single.items()})


def test_real_matrices_of_a_complex_scan(built):
    """Stand for complex ones; so do their gradients."""
    inputs, options = make('complex-euler', state=4)
    real = inputs | {name: inputs[name].real for name in 'BC'}
    wide = real | {name: real[name].to(torch.complex64) for name in 'BC'}
    actual, wanted = run(real, options), run(wide, options)
    wanted |= {name: wanted[name].real for name in ('dB', 'dC')}
    assert_equal(actual, wanted)


@pytest.mark.parametrize('first', [fused, cpu], ids=['fused', 'cpu'])
def test_mixes_with_the_cpu_backend(first, mode, built):
    """Stored states have one meaning: either backend continues the other."""
    inputs, options = make(mode, (False, True), groups=(2, 1), length=70)
    second = cpu if first is fused else fused
    y, last, borders = first.forward(given(inputs, **options), True)
    grads = second.backward(
        make_seed(y), make_seed(last), borders, given(inputs, **options)
    )
    gradients = dict(zip((f'd{n}' for n in TENSORS), grads, strict=True))
    SCAN_DIRECTIONS.assert_close(
        dict(y=y, last=last, **gradients),
        SCAN_DIRECTIONS.run(inputs, **options),
        SCAN_DIRECTIONS.run(inputs, dtype=torch.float64, **options),
        6e-6,
    )


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
    return fused.forward(inputs, False)[1].flatten()


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
    _, last, borders = fused.forward(inputs, True)
    grads = fused.backward(0 * one, torch.ones_like(last), borders, inputs)
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
    y, _, borders = fused.forward(inputs, True)
    _, grad, *_ = fused.backward(one, None, borders, inputs)
    y, grad, wide = y.flatten(), grad.flatten(), x.double()
    # log1p(exp(x)) itself: torch's float64 softplus rounds exp(-20) away
    exact = wide.clamp(min=0) + torch.log1p(torch.exp(-wide.abs()))
    assert ((y - exact).abs() <= 4 * EPS * exact).all()
    slope = torch.sigmoid(wide)
    assert ((grad - slope).abs() <= 4 * EPS * slope).all()
    above = x > 20
    assert torch.equal(y[above], x[above])


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('name', TENSORS)
def test_not_finite_stays_visible(name, value, mode, built):
    """Outputs and gradients are finite only where the definition's are."""
    inputs, options = make(mode, length=20, dim=5, state=2)
    inputs[name].view(-1)[inputs[name].numel() // 2] = value
    actual = run(inputs, options)
    for key, wanted in SCAN_DIRECTIONS.run(inputs, **options).items():
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
        check(*make(mode, (False, True), length=65, dim=21, state=6))
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
from test_fused_scan import given, make

def memory(field):
    rows = Path('/proc/self/status').read_text().splitlines()
    row = next(x for x in rows if x.startswith(field + ':'))
    return float(row.split()[1]) / 1024

torch.set_num_threads(2)
for mode in ('real-euler', 'complex-zoh'):
    for batch in (1, 32):  # once to load and build everything
        inputs, options = make(mode, batch=batch, length=197, dim=384)
        inputs = given(inputs, **options)
        dy = torch.ones_like(inputs.u)
        Path('/proc/self/clear_refs').write_text('5')  # forget the peak
        before = memory('VmRSS')
        y, _, borders = fused.forward(inputs, True)
        grads = fused.backward(dy, None, borders, inputs)
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


def test_float64_is_refused(built):
    """By name; left to itself, the cpu backend takes over."""
    inputs = convert(make_inputs(), torch.float64)
    with pytest.raises(TypeError, match=r"float64; use backend='cpu'"):
        selective_scan_directions(**inputs, reverse=(False,), backend='fused')
    auto, wanted = (
        SCAN_DIRECTIONS.run(inputs, backend) for backend in ('auto', 'cpu')
    )
    assert_equal(auto, wanted)


def scan(inputs, backend):
    """The public function, one direction."""
    one = {name: x[0] for name, x in inputs.items()}
    options = dict(delta_softplus=True, channels_last=True)
    return selective_scan(**one, **options, backend=backend)


def test_falls_back(no_compiler, messages):
    """The cpu backend without a compiler, and one line in the log."""
    inputs = make_inputs()
    for _ in range(2):
        assert torch.equal(scan(inputs, 'auto'), scan(inputs, 'cpu'))
    assert len(messages) == 1
    with pytest.raises(RuntimeError, match='could not be built'):
        scan(inputs, 'fused')


def test_recorded_graph_without_a_compiler(built, no_compiler):
    """An exported one may come to a machine that has none."""
    inputs, options = make()
    tensors = given(inputs, **options)
    results = [module.forward(tensors, True) for module in (fused, cpu)]
    assert all(map(torch.equal, *results))
    results = [
        module.backward(y, last, borders, tensors)
        for module, (y, last, borders) in zip(
            (fused, cpu), results, strict=True
        )
    ]
    assert all(map(torch.equal, *results))


def _scan_in_child(inputs, wanted):
    equal = torch.equal(scan(inputs, 'fused'), wanted)
    raise SystemExit(0 if equal else 3)


def test_runs_after_a_fork(built, two_threads):
    """The parent's OpenMP threads are missing in a forked child."""
    inputs = make_inputs(batch=4)
    wanted = scan(inputs, 'fused')
    context = multiprocessing.get_context('fork')
    child = context.Process(target=_scan_in_child, args=(inputs, wanted))
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs
    assert child.exitcode == 0
