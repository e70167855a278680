"""The scan against stored numbers, against itself, and bad input."""

import importlib
import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import selective_scan, selective_scan_directions
from mmstabvim.ops.selective_scan import (
    ScanInputs,
    _resolve,
    cpu,
    has_triton,
    selective_scan_ref,
)
from mmstabvim.ops.selective_scan.function import scan_flops

NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
BACKENDS = ('reference', 'cpu')


@pytest.fixture(params=['reference', 'cpu', 'cpu without compiler'])
def backend(request, monkeypatch):
    """Each way to compute: the cpu backend also without its C++ path."""
    name, *without = request.param.split(' ', 1)
    if without:
        monkeypatch.setenv('MMSTABVIM_FUSED', '0')
    return name


def double(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def relative(value, exact):
    """Largest error relative to the largest magnitude."""
    exact = double(torch.as_tensor(exact))
    return (double(value.detach()) - exact).abs().max() / exact.abs().max()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('case', range(1, 19))
def test_official_scan(golden, case, dtype, backend):
    """Output, last state and every gradient of the official reference."""
    check_official_scan(golden('selective_scan.npz'), case, dtype, backend)


LONG = (4, 9, 16)
"""Many tokens of several programs: a minute each when interpreted."""

ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'),
)


@pytest.mark.skipif(not has_triton(), reason='no triton')
@pytest.mark.parametrize(
    'case',
    [
        pytest.param(case, marks=ON_GPU) if case in LONG else case
        for case in range(1, 19)
    ],
)
def test_official_scan_in_triton(golden, case, fast_interpreter):
    """The same in float32, interpreted without a GPU."""
    data = golden('selective_scan.npz')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    check_official_scan(data, case, torch.float32, 'triton', device)


def check_official_scan(data, case, dtype, backend, device='cpu'):
    """All results, to a rounding of the dtype."""

    def load(name):
        key = f'case{case:02d}/{name}'
        if key not in data.files:
            return None
        return torch.from_numpy(data[key]).to(device)

    given = {n: load(n) for n in NAMES}
    given = {n: t for n, t in given.items() if t is not None}
    if dtype == torch.float64:
        given = {n: double(t) for n, t in given.items()}
    given = {n: t.clone().requires_grad_() for n, t in given.items()}
    out, last = selective_scan(
        *(given.get(n) for n in NAMES),
        bool(data[f'case{case:02d}/delta_softplus']),
        True,
        backend=backend,
    )
    (out * load('dout')).sum().backward()
    bound = 3e-6 if dtype == torch.float32 else 1e-10
    assert relative(out, load('out_f64')) <= bound
    assert relative(last, load('last_state_f64')) <= bound
    for name, tensor in given.items():
        exact = load(f'grad_{name}')
        if not exact.any():  # length 1: A has no influence
            assert not tensor.grad.any(), name
            continue
        # these gradients are stored as float32
        bound = 3e-6 if dtype == torch.float32 else 1e-6
        assert relative(tensor.grad, exact) <= bound, name


def make_inputs(
    batch=2,
    length=37,
    dim=6,
    state=4,
    groups=1,
    complex_a=False,
    constant=False,
    dtype=torch.float64,
    seed=0,
):
    """Channels-last inputs; complex ones follow the real dtype."""
    generator = torch.Generator().manual_seed(seed)
    wide = dtype.to_complex() if complex_a else dtype

    def normal(*shape, like=dtype):
        return torch.randn(*shape, dtype=like, generator=generator)

    a = -torch.rand(dim, state, dtype=dtype, generator=generator) - 0.1
    matrix = (dim, state) if constant else (batch, length, groups, state)
    return dict(
        u=normal(batch, length, dim),
        delta=normal(batch, length, dim),
        A=torch.complex(a, normal(dim, state)) if complex_a else a,
        B=normal(*matrix, like=wide),
        C=normal(*matrix, like=wide),
        D=normal(dim),
        z=normal(batch, length, dim),
        delta_bias=normal(dim),
    )


def run(inputs, **options):
    """Output, last state and all gradients of a random weighting of both."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    out, last = selective_scan(
        **leaves,
        delta_softplus=True,
        return_last_state=True,
        channels_last=True,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).to(out.dtype)
    dlast = torch.randn(last.shape, generator=generator).to(last.dtype)
    loss = (out * dout).sum() + (last * dlast.conj()).sum().real
    loss.backward()
    return dict(
        out=out.detach(),
        last=last.detach(),
        **{f'd{k}': v.grad for k, v in leaves.items()},
    )


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize('length', [1, 2, 15, 16, 17, 37, 197])
def test_cpu_backend_equals_reference(length, complex_a, reverse, b_disc):
    """Values, and gradients through output and last state, in float64."""
    inputs = make_inputs(length=length, complex_a=complex_a, groups=2)
    options = dict(reverse=reverse, b_disc=b_disc)
    exact = run(inputs, backend='reference', **options)
    fast = run(inputs, backend='cpu', **options)
    for name, value in exact.items():
        torch.testing.assert_close(
            fast[name], value, rtol=1e-10, atol=1e-11, msg=name
        )


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('constant', ['B', 'C', 'BC'])
def test_constant_matrices(constant, b_disc, complex_a):
    """Constant and input-dependent B and C mix."""
    options = dict(complex_a=complex_a, dim=8, groups=2)
    inputs = make_inputs(**options)
    fixed = make_inputs(constant=True, **options)
    inputs |= {name: fixed[name] for name in constant}
    exact = run(inputs, backend='reference', b_disc=b_disc)
    fast = run(inputs, backend='cpu', b_disc=b_disc)
    for name, value in exact.items():
        torch.testing.assert_close(
            fast[name], value, rtol=1e-10, atol=1e-11, msg=name
        )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.half])
def test_low_precision(dtype, backend):
    """The error is that of rounding inputs and outputs, not of the state."""
    inputs = {
        k: v.to(dtype)
        for k, v in make_inputs(length=197, dtype=torch.float64).items()
    }
    inputs['A'] = inputs['A'].float()
    exact = run({k: double(v) for k, v in inputs.items()}, backend='reference')
    low = run(inputs, backend=backend)
    assert low['out'].dtype == dtype
    assert low['last'].dtype == torch.float32
    assert all(low[f'd{k}'].dtype == v.dtype for k, v in inputs.items())
    eps = torch.finfo(dtype).eps
    for name, value in exact.items():
        assert relative(low[name], value) <= max(2 * eps, 3e-6), name


def test_reverse_is_flip(backend):
    """``reverse`` equals flipping every input and the output."""
    inputs = make_inputs()
    inputs.pop('z')
    along_tokens = ('u', 'delta', 'B', 'C')
    flipped = {
        k: v.flip(1) if k in along_tokens else v for k, v in inputs.items()
    }
    ours = run(inputs, backend=backend, reverse=True)
    theirs = run(flipped, backend=backend)
    assert not torch.equal(ours['out'], theirs['out'])
    out, last = (
        selective_scan(
            **x,
            delta_softplus=True,
            return_last_state=True,
            channels_last=True,
            backend=backend,
            reverse=reverse,
        )
        for x, reverse in ((inputs, True), (flipped, False))
    )
    torch.testing.assert_close(out[0], last[0].flip(1))
    torch.testing.assert_close(out[1], last[1])


def test_layouts_agree(backend):
    """Both layouts, a missing group axis, and strided views."""
    inputs = make_inputs(complex_a=True)
    wanted = selective_scan(**inputs, channels_last=True, backend=backend)

    def public(name, x):
        if name in ('u', 'delta', 'z'):
            return x.transpose(1, 2)
        if name in ('B', 'C'):  # interleaved, without groups
            x = torch.view_as_real(x[:, :, 0].transpose(1, 2).contiguous())
            return x.flatten(-2)
        return x

    given = {name: public(name, x) for name, x in inputs.items()}
    out = selective_scan(**given, backend=backend)
    torch.testing.assert_close(out.transpose(1, 2), wanted)

    strided = {
        k: torch.stack([v, v], dim=-1)[..., 0] for k, v in inputs.items()
    }
    assert not strided['u'].is_contiguous()
    again = selective_scan(**strided, channels_last=True, backend=backend)
    torch.testing.assert_close(again, wanted)


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('complex_a', [False, True])
def test_gradcheck(complex_a, b_disc):
    """Finite differences agree with the backward pass of the cpu backend."""
    inputs = make_inputs(1, 5, 2, 2, complex_a=complex_a)
    leaves = [v.requires_grad_() for v in inputs.values()]

    def scan(*args):
        return selective_scan(
            *args,
            True,
            True,
            channels_last=True,
            b_disc=b_disc,
            backend='cpu',
        )

    assert torch.autograd.gradcheck(scan, leaves)


def test_zero_order_hold_by_hand():
    """Two real modes, three tokens, computed by hand (both rules)."""
    delta = torch.tensor([0.5, 1.0, 0.25]).double()[None, :, None]
    u = torch.tensor([1.0, -2.0, 3.0]).double()[None, :, None]
    A = torch.tensor([[-1.0, -2.0]]).double()
    B = torch.tensor([[1, 0.5], [-1, 2], [0.5, 0.5]]).double()[None]
    C = torch.tensor([[1, 1], [2, -1], [0.5, 3]]).double()[None]
    D = torch.tensor([0.5]).double()
    wanted = dict(
        euler=[1.25, 7.3340456204, -3.5538771853],
        zoh=[1.05149948, 3.5259231772, -0.0078914139],
    )
    for b_disc, values in wanted.items():
        for backend in BACKENDS:
            y = selective_scan(
                u,
                delta,
                A,
                B,
                C,
                D,
                channels_last=True,
                b_disc=b_disc,
                backend=backend,
            )
            exact = torch.tensor(values, dtype=torch.float64)
            torch.testing.assert_close(
                y.flatten(), exact, rtol=1e-8, atol=1e-8
            )


class LargestTensor(TorchDispatchMode):
    """Remember the most elements that the storage of any result had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                numel = x.untyped_storage().nbytes() // x.itemsize
                self.numel = max(self.numel, numel)
        return out


def test_no_tensor_with_states_of_all_tokens():
    """States are kept at chunk borders and for one chunk, in backward too."""
    batch, length, dim, state = 2, 512, 64, 16
    whole = batch * length * dim * state
    inputs = make_inputs(batch, length, dim, state)
    z, bias = inputs.pop('z'), inputs.pop('delta_bias')
    tensors = (*inputs.values(), bias)
    given = ScanInputs(*(x[None] for x in tensors), True, (False,), 'euler')
    # inside the operator a dispatch mode sees nothing: call its parts
    with LargestTensor() as forward:
        y, _, borders = cpu.forward(given, True)
    with LargestTensor() as backward:
        cpu.backward(z[None], None, borders, given)
    assert borders.numel() == whole // cpu.CHUNK
    assert y.numel() <= forward.numel <= whole // cpu.CHUNK
    assert y.numel() <= backward.numel <= whole // cpu.CHUNK
    with LargestTensor() as plain:
        selective_scan_ref(*tensors, True)
    assert plain.numel < whole  # without autograd nothing is kept
    leaves = [x.requires_grad_() for x in tensors]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        selective_scan_ref(*leaves, True)
    assert sum(saved) > whole  # what the backend avoids


def test_same_result_twice():
    """Bitwise equal from run to run."""
    inputs = make_inputs(batch=3, length=197, dim=96, dtype=torch.float32)
    first, second = run(inputs, backend='cpu'), run(inputs, backend='cpu')
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_autocast_does_not_touch_the_state():
    """Inside autocast the result is the same as outside."""
    inputs = make_inputs(dtype=torch.float32)
    for backend in BACKENDS:
        plain = run(inputs, backend=backend)
        with torch.autocast('cpu', torch.bfloat16):
            under = run(inputs, backend=backend)
        assert all(torch.equal(plain[k], under[k]) for k in plain)


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('constant', [False, True])
@pytest.mark.parametrize('complex_a', [False, True])
def test_directions_are_scans(complex_a, constant, b_disc, backend):
    """Each as if alone, values and gradients, three with orders of theirs."""
    reverse = (True, False, True)
    single = [
        make_inputs(seed=seed, complex_a=complex_a, constant=constant)
        for seed in range(3)
    ]
    for x in single:
        x.pop('z')
    alone = [
        {k: v.clone().requires_grad_() for k, v in x.items()} for x in single
    ]
    options = dict(delta_softplus=True, b_disc=b_disc, backend=backend)
    y = [
        selective_scan(**x, channels_last=True, reverse=order, **options)
        for x, order in zip(alone, reverse, strict=True)
    ]
    sum(out.sin().sum() for out in y).backward()
    together = {
        name: torch.stack([x[name] for x in single]).requires_grad_()
        for name in single[0]
    }
    stacked = selective_scan_directions(**together, reverse=reverse, **options)
    stacked.sin().sum().backward()
    assert torch.equal(stacked, torch.stack(y))
    for name, leaf in together.items():
        wanted = torch.stack([x[name].grad for x in alone])
        assert relative(leaf.grad, wanted) <= 1e-12, name


def test_directions_keep_half_precision():
    inputs = make_inputs(dtype=torch.float32)
    inputs.pop('z')
    stacked = {k: torch.stack([v, v]) for k, v in inputs.items()}
    stacked['u'] = stacked['u'].bfloat16()
    y = selective_scan_directions(**stacked)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(reverse=(True,)), 'u must have the 1 directions of reverse'),
        (dict(reverse=()), 'at least one'),
        (dict(D=lambda x: x[:1]), r'D must have the 2 directions'),
        (dict(A=lambda x: x[..., 0]), r'A must be \(dim, state\)'),
        (dict(B=lambda x: x[:, 0]), r'B must be \(directions, batch'),
        (dict(C=lambda x: x[:, :, 1:]), 'C must be'),
        (dict(delta=lambda x: x[:, 1:]), 'delta must have the shape of u'),
        (dict(b_disc='foh'), 'b_disc must be one of'),
    ],
    ids=range(8),
)
def test_bad_directions(changes, message):
    inputs = make_inputs()
    inputs.pop('z')
    stacked = {k: torch.stack([v, v]) for k, v in inputs.items()}
    for name, change in changes.items():
        stacked[name] = change(stacked[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        selective_scan_directions(**stacked)


def test_auto_never_picks_something_slow_on_a_gpu(monkeypatch):
    """Triton, or an error that says what to do."""
    monkeypatch.delenv('MMSTABVIM_BACKEND', raising=False)
    gpu = torch.device('cuda')
    module = importlib.import_module('mmstabvim.ops.selective_scan')
    monkeypatch.setattr(module, 'has_triton', lambda: True)
    assert _resolve('auto', gpu) == 'triton'
    assert _resolve('auto', torch.device('cpu')) == 'cpu'
    assert _resolve('cpu', gpu) == 'cpu'
    monkeypatch.setattr(module, 'has_triton', lambda: False)
    with pytest.raises(RuntimeError, match=r"pip install triton.*'cpu'"):
        _resolve('auto', gpu)
    monkeypatch.setenv('MMSTABVIM_BACKEND', 'reference')
    assert _resolve('auto', gpu) == 'reference'
    assert _resolve('cpu', gpu) == 'cpu'


def test_triton_is_looked_for():
    assert has_triton() == (importlib.util.find_spec('triton') is not None)


def test_registered_with_pytorch():
    """Schema, fake tensors and autograd registration are sound."""
    for complex_a in (False, True):
        x = make_inputs(length=19, groups=2, complex_a=complex_a)
        x.pop('z')
        leaves = (torch.stack([v, v]).requires_grad_() for v in x.values())
        args = (*leaves, True, [0, 1], 'euler', True)
        torch.library.opcheck(torch.ops.mmstabvim.selective_scan, args)


def test_compiles_in_one_graph():
    """``torch.compile`` sees one operator: no graph break."""
    inputs = make_inputs(dtype=torch.float32)

    def scan(**kwargs):
        return selective_scan(
            **kwargs, channels_last=True, delta_softplus=True, backend='cpu'
        )

    compiled = torch.compile(scan, backend='aot_eager', fullgraph=True)
    leaves = [
        {k: v.clone().requires_grad_() for k, v in inputs.items()}
        for _ in range(2)
    ]
    for function, x in zip((scan, compiled), leaves, strict=True):
        function(**x).square().sum().backward()
    for name in inputs:
        a, b = (x[name].grad for x in leaves)
        torch.testing.assert_close(a, b, msg=name)


def test_flops_are_counted():
    """``FlopCounterMode`` uses the formula; it is linear in the length."""
    counts = []
    for length in (10, 20):
        inputs = make_inputs(length=length)
        inputs.pop('z')
        with FlopCounterMode(display=False) as counter:
            selective_scan(**inputs, channels_last=True, backend='cpu')
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0]
    assert counts[0] == scan_flops((2, 10, 6), (6, 4), False)
    assert counts[0] == 2 * 10 * 6 * (7 * 4 + 6)


BAD_INPUTS = {
    'delta': (lambda x: x[:, 1:], ValueError, 'delta must have the shape'),
    'A': (lambda x: x[1:], ValueError, r'A must be \(dim, state\)'),
    'B': (lambda x: x[..., 1:], ValueError, 'B must be'),
    'C': (lambda x: x[:, 1:], ValueError, 'C must be'),
    'D': (lambda x: x[1:], ValueError, r'D must be \(6,\)'),
    'z': (lambda x: x[..., :1], ValueError, 'z must have the shape'),
    'delta_bias': (lambda x: x[None], ValueError, 'delta_bias must be'),
    'u': (lambda x: x.long(), TypeError, 'u must have a real floating'),
}


@pytest.mark.parametrize('name', BAD_INPUTS)
def test_shapes_and_dtypes_are_checked(name):
    change, error, message = BAD_INPUTS[name]
    inputs = make_inputs()
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=message):
        selective_scan(**inputs, channels_last=True)


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'u'])
def test_every_tensor_must_float_and_share_the_device(name):
    inputs = make_inputs()
    integers = inputs | {name: inputs[name].int()}
    with pytest.raises(TypeError, match=f'{name} must have'):
        selective_scan(**integers, channels_last=True)
    elsewhere = inputs | {name: inputs[name].to('meta')}
    with pytest.raises(ValueError, match=f'{name} must be on the device'):
        selective_scan(**elsewhere, channels_last=True)


def test_names_are_checked(monkeypatch):
    inputs = make_inputs()
    with pytest.raises(ValueError, match='b_disc must be one of'):
        selective_scan(**inputs, channels_last=True, b_disc='tustin')
    with pytest.raises(ValueError, match=r"backend must be one of.*'cuda'"):
        selective_scan(**inputs, channels_last=True, backend='cuda')
    with pytest.raises(TypeError, match='unexpected keyword'):
        selective_scan(**inputs, softplus=True)
    monkeypatch.setenv('MMSTABVIM_BACKEND', 'cud')
    with pytest.raises(ValueError, match='MMSTABVIM_BACKEND must be'):
        selective_scan(**inputs, channels_last=True)
    selective_scan(**inputs, channels_last=True, backend='cpu')


def test_groups_must_divide_the_channels():
    inputs = make_inputs(groups=4)
    with pytest.raises(ValueError, match=r'divides dim 6.*got \[4, 4\]'):
        selective_scan(**inputs, channels_last=True)
    inputs = make_inputs(groups=2) | {'C': make_inputs(groups=3)['C']}
    with pytest.raises(ValueError, match=r'the same number.*got \[2, 3\]'):
        selective_scan(**inputs, channels_last=True)


@pytest.mark.parametrize('grouped', 'BC')
def test_one_matrix_may_be_shared_by_all_groups(grouped):
    inputs = make_inputs() | {grouped: make_inputs(groups=3)[grouped]}
    exact = run(inputs, backend='reference')
    fast = run(inputs, backend='cpu')
    for name, value in exact.items():
        torch.testing.assert_close(fast[name], value, msg=name)


def test_complex_matrices_belong_to_a_complex_a():
    inputs = make_inputs(complex_a=True)
    real_a = inputs | {'A': inputs['A'].real}
    with pytest.raises(TypeError, match='B must have a real floating'):
        selective_scan(**real_a, channels_last=True)
    real_b = inputs | {'B': inputs['B'].real}
    with pytest.raises(ValueError, match=r'B must be .* complex'):
        selective_scan(**real_b, channels_last=True)
