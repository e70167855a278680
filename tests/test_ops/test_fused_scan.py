"""The fused C++ path of the ``cpu`` backend, against the definition."""

import multiprocessing
import platform

import pytest
import torch

from mmstabvim.ops import native
from mmstabvim.ops.selective_scan import fused, selective_scan
from mmstabvim.ops.selective_scan.function import selective_scan_op
from mmstabvim.ops.selective_scan.reference import selective_scan_ref

pytestmark = pytest.mark.usefixtures('one_thread')

TOLERANCE = 3e-6
"""Of an array's largest magnitude: what goldens of float32 may differ by."""

ARGUMENTS = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')


@pytest.fixture
def calls(monkeypatch):
    """Names of the fused functions as they are called; skips without them."""
    if fused.library() is None:
        pytest.skip('no C++ compiler that can build the fused path')
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


def make_inputs(
    batch=2, length=37, dim=20, state=16, groups=1, constant='', absent=()
):
    """Inputs of the scan by name, float32, reproducible."""
    generator = torch.Generator().manual_seed(length * 1000 + dim + state)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def matrix(name):
        if name in constant:
            return normal(dim, state)
        return normal(batch, length, groups, state)

    inputs = {
        'u': normal(batch, length, dim),
        'delta': normal(batch, length, dim) - 1,
        'A': -2 * torch.rand(dim, state, generator=generator),
        'B': matrix('B'),
        'C': matrix('C'),
        'D': normal(dim),
        'delta_bias': normal(dim),
    }
    return {k: None if k in absent else v for k, v in inputs.items()}


def run(scan, inputs, dtype=torch.float32, softplus=True, reverse=False):
    """Both outputs and the gradient of every input, by name."""
    leaves = {
        name: None if x is None else x.to(dtype).detach().requires_grad_()
        for name, x in inputs.items()
    }
    y, last = scan(*leaves.values(), softplus, reverse, 'euler')
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum()
        for x in (y, last)
    )
    loss.backward()
    grads = {
        f'd{name}': leaf.grad
        for name, leaf in leaves.items()
        if leaf is not None
    }
    return {'y': y.detach(), 'last': last.detach(), **grads}


def assert_close(actual, exact, tolerance=TOLERANCE):
    assert actual.keys() == exact.keys()
    for name, wanted in exact.items():
        error = (actual[name] - wanted).abs().max()
        bound = tolerance * wanted.abs().max()
        assert error <= bound, f'{name}: {error:.2e} > {bound:.2e}'


def assert_equal(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(actual[name], x), name


def check(inputs, calls, **options):
    """The fused path ran, and agrees with the definition in float64."""
    actual = run(selective_scan_op, inputs, **options)
    assert calls == ['forward', 'backward']
    exact = run(selective_scan_ref, inputs, torch.float64, **options)
    assert_close(actual, exact)


@pytest.mark.parametrize('case', range(1, 14))
def test_goldens(case, golden, calls):
    """Every golden case with a real A."""
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


@pytest.mark.parametrize('length', [1, 2, 37, 63, 64, 65, 197])
@pytest.mark.parametrize('dim', [1, 3, 16, 17, 96, 100])
def test_lengths_and_dims(length, dim, calls):
    check(make_inputs(length=length, dim=dim, state=4), calls)


@pytest.mark.parametrize('state', [1, 2, 4, 7, 8, 16, 20, 64])
@pytest.mark.parametrize('reverse', [False, True])
def test_states(state, reverse, calls):
    check(make_inputs(state=state), calls, reverse=reverse)


@pytest.mark.parametrize('constant', ['', 'B', 'C', 'BC'])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('reverse', [False, True])
def test_matrices(constant, groups, reverse, calls):
    inputs = make_inputs(groups=groups, constant=constant, dim=42)
    check(inputs, calls, reverse=reverse)


@pytest.mark.parametrize('absent', [('D',), ('delta_bias',)], ids=str)
def test_absent_inputs(absent, calls):
    check(make_inputs(absent=absent), calls)


def test_without_softplus(calls):
    inputs = make_inputs(absent=('delta_bias',))
    inputs['delta'] = inputs['delta'].abs()
    check(inputs, calls, softplus=False)


@pytest.mark.parametrize('batch', [1, 3, 40])
def test_batches(batch, calls, two_threads):
    """One slab and many slabs of channels."""
    check(make_inputs(batch=batch, length=17, dim=100, state=3), calls)


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


@pytest.mark.parametrize('axes', [(0,), (1,), (2,), (0, 1)], ids=str)
def test_non_contiguous(axes, calls):
    """Strides of batch, tokens and channels (or groups) are respected."""
    inputs = make_inputs(groups=2)
    views = {
        name: strided(x, axes) if x.dim() > 2 else strided(x, (0,))
        for name, x in inputs.items()
    }
    plain = selective_scan_op(*inputs.values(), True, False, 'euler')
    views = selective_scan_op(*views.values(), True, False, 'euler')
    assert calls == ['forward', 'forward']
    assert torch.equal(plain[0], views[0])
    assert torch.equal(plain[1], views[1])


def test_strided_gradient(calls):
    """The gradient of the output may have any layout."""
    inputs = make_inputs()
    leaf = inputs['u'].requires_grad_()
    y, _ = selective_scan_op(*inputs.values(), True, False, 'euler')
    dy = torch.randn(y.shape)
    (plain,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
    by_channel = dy.transpose(1, 2).contiguous().transpose(1, 2)
    (strided_dy,) = torch.autograd.grad(y, leaf, by_channel)
    assert torch.equal(plain, strided_dy)


@pytest.mark.parametrize('batch', [1, 5])
def test_same_bits(batch, calls, two_threads):
    """From run to run and for every number of threads."""
    inputs = make_inputs(batch=batch, length=65, dim=100)
    first = run(selective_scan_op, inputs)
    assert_equal(run(selective_scan_op, inputs), first)
    torch.set_num_threads(1)
    assert_equal(run(selective_scan_op, inputs), first)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype, calls):
    """As if the inputs had been converted first; gradients rounded once."""
    inputs = {k: x.to(dtype) for k, x in make_inputs().items()}
    widened = {k: x.float() for k, x in inputs.items()}
    half = run(selective_scan_op, inputs, dtype)
    single = run(selective_scan_op, widened)
    rounded = {
        k: x.to(dtype) if k.startswith('d') else x for k, x in single.items()
    }
    assert_equal(half, rounded)


@pytest.mark.parametrize('switch', ['forward', 'backward'])
def test_mixes_with_the_torch_variant(switch, calls, monkeypatch):
    """Stored states have one meaning: either variant continues the other."""
    inputs = make_inputs(groups=2, length=70)
    exact = run(selective_scan_ref, inputs, torch.float64, reverse=True)
    supports = fused.supports
    answers = iter([switch == 'forward', switch == 'backward'])
    monkeypatch.setattr(
        fused, 'supports', lambda *args: next(answers) and supports(*args)
    )
    actual = run(selective_scan_op, inputs, reverse=True)
    assert calls == [switch]
    assert_close(actual, exact)


def decay(x):
    """``exp(x)``, read off a scan: a state of 1, then one step."""
    shape = (1, 2, x.numel())
    # infinite times zero is NaN: the first step must not overflow
    delta = torch.tensor([2.0**-110, 1.0])[None, :, None].expand(shape)
    u = torch.tensor([2.0**110, 0.0])[None, :, None].expand(shape)
    matrix = torch.ones(1, 2, 1, 1)
    inputs = (u, delta, x[:, None], matrix, matrix, None, None)
    return selective_scan_op(*inputs, False, False, 'euler')[0][0, 1]


def check_decay():
    x = torch.linspace(-87, 88, 100_003)
    exact = x.double().exp()
    error = (decay(x) - exact).abs() / exact
    # 1.5 ulp, and the rounding of x log2(e)
    bound = (1.5 + x.abs()) * torch.finfo(torch.float32).eps
    assert (error <= bound).all()
    ends = torch.tensor([-1e30, -1e4, -110.0, 0.0, 90.0, 1e4, 1e30])
    assert decay(ends).tolist() == [0, 0, 0, 1, *[float('inf')] * 3]
    assert decay(torch.tensor([float('-inf')])).tolist() == [0]
    assert decay(torch.tensor([float('nan')])).isnan().all()


def test_decay_is_accurate(calls):
    check_decay()


def test_softplus_is_accurate(calls):
    """Value and slope to 4 roundings, the identity above 20."""
    x = torch.cat([torch.linspace(-86, 100, 100_003), torch.zeros(1)])
    delta = x[None, None].requires_grad_()
    one, A = torch.ones_like(delta), torch.zeros(x.numel(), 1)
    matrix = torch.ones(1, 1, 1, 1)
    inputs = (one, delta, A, matrix, matrix, None, None)
    y, _ = selective_scan_op(*inputs, True, False, 'euler')
    y.sum().backward()
    wide = x.double()
    bound = 4 * torch.finfo(torch.float32).eps
    # log1p(exp(x)) itself: torch's float64 softplus rounds exp(-20) away
    exact = wide.clamp(min=0) + torch.log1p(torch.exp(-wide.abs()))
    assert ((y[0, 0] - exact).abs() <= bound * exact).all()
    slope = torch.sigmoid(wide)
    assert ((delta.grad[0, 0] - slope).abs() <= bound * slope).all()
    above = x > 20
    assert torch.equal(y[0, 0, above], x[above])


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('name', ARGUMENTS)
def test_not_finite_stays_visible(name, value, calls):
    """Outputs and gradients are finite where the definition's are."""
    inputs = make_inputs(length=20, dim=5, state=2)
    inputs[name].view(-1)[inputs[name].numel() // 2] = value
    actual = run(selective_scan_op, inputs)
    exact = run(selective_scan_ref, inputs)
    assert calls == ['forward', 'backward']
    for key, wanted in exact.items():
        visible = ~wanted.isfinite()
        assert (~actual[key].isfinite())[visible].all(), key
        if value != value:
            assert torch.equal(~actual[key].isfinite(), visible), key


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='x86 flags')
@pytest.mark.parametrize('flag', ['-mno-avx512f', '-mno-avx'])
def test_other_vector_lengths(flag, calls, monkeypatch, empty_cache, messages):
    """The portable code, with eight and with four lanes."""
    monkeypatch.setattr(native, 'FLAGS', (*native.FLAGS, flag))
    check(make_inputs(length=65, dim=21, state=6), calls)
    check_decay()
    assert not messages
    assert len(list(empty_cache.glob('*.so'))) == 1


UNSUPPORTED = {
    'float64': ({'u': torch.float64}, 'euler'),
    'complex': (dict.fromkeys('ABC', torch.complex64), 'euler'),
    'zoh': ({}, 'zoh'),
}


@pytest.mark.parametrize('case', UNSUPPORTED)
def test_leaves_the_rest_to_torch(case, calls):
    dtypes, b_disc = UNSUPPORTED[case]
    inputs = {k: x.to(dtypes.get(k)) for k, x in make_inputs().items()}
    assert not fused.supports(*inputs.values(), b_disc)
    selective_scan_op(*inputs.values(), True, False, b_disc)
    assert not calls


def test_environment_variable_turns_it_off(calls, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, '0')
    exact = run(selective_scan_ref, make_inputs(), torch.float64)
    assert_close(run(selective_scan_op, make_inputs()), exact)
    assert not calls


def test_falls_back(calls, no_compiler, messages):
    """The same numbers without a compiler, and one line in the log."""
    exact = run(selective_scan_ref, make_inputs(), torch.float64)
    for _ in range(2):
        assert_close(run(selective_scan_op, make_inputs()), exact)
    assert not calls
    assert len(messages) == 1


def _scan_in_child(inputs, wanted):
    y, _ = selective_scan_op(*inputs.values(), True, False, 'euler')
    raise SystemExit(0 if torch.equal(y, wanted) else 3)


def test_runs_after_a_fork(calls, two_threads):
    """The parent's OpenMP threads are missing in a forked child."""
    inputs = make_inputs(batch=4)
    y, _ = selective_scan_op(*inputs.values(), True, False, 'euler')
    context = multiprocessing.get_context('fork')
    child = context.Process(target=_scan_in_child, args=(inputs, y))
    child.start()
    child.join(60)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs
    assert child.exitcode == 0
