"""The scan against stored numbers, against itself, and bad input."""

import pytest
import torch
from operator_tester import SCAN, SCAN_DIRECTIONS, convert
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import selective_scan, selective_scan_directions
from mmstabvim.ops.backend import has_triton
from mmstabvim.ops.selective_scan import ScanInputs, cpu, selective_scan_ref
from mmstabvim.ops.selective_scan.function import scan_flops

NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')
BACKENDS = ('reference', 'cpu')


@pytest.fixture(params=['reference', 'cpu', 'auto'])
def backend(request):
    """Each way to compute on a CPU; what is fastest for the inputs."""
    return request.param


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


def make_inputs(dtype=torch.float64, **sizes):
    """Channels-last inputs of one direction, gated."""
    defaults = dict(batch=2, length=37, dim=6, state=4)
    inputs = SCAN.make(**defaults | sizes)
    return convert(inputs | {'z': inputs['u'].flip(1)}, dtype)


LENGTHS = [1, 2, 15, 16, 17, 37, 197]


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize('length', LENGTHS)
def test_cpu_backend_equals_reference(length, complex_a, b_disc):
    """Values, and gradients through output and last state, in float64."""
    sizes = dict(batch=2, dim=6, state=4, groups=2, complex_a=complex_a)
    inputs = SCAN_DIRECTIONS.make(length=length, **sizes)
    SCAN_DIRECTIONS.check(
        convert(inputs, torch.float64),
        'cpu',
        tolerance=1e-10,
        b_disc=b_disc,
        reverse=(False, True),
    )


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('constant', ['B', 'C', 'BC'])
def test_constant_matrices(constant, b_disc, complex_a):
    """Constant and input-dependent B and C mix."""
    sizes = dict(batch=2, dim=8, state=4, groups=2, complex_a=complex_a)
    inputs = SCAN_DIRECTIONS.make(constant=constant, **sizes)
    SCAN_DIRECTIONS.check(
        convert(inputs, torch.float64), 'cpu', tolerance=1e-10, b_disc=b_disc
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.half])
def test_low_precision(dtype, backend):
    """The error is that of rounding inputs and outputs, not of the state."""
    inputs = make_inputs(dtype, length=197) | {
        'A': make_inputs(torch.float32, length=197)['A']
    }
    SCAN.check(inputs, backend)


def test_reverse_is_flip(backend):
    """``reverse`` equals flipping every input and the output."""
    inputs = make_inputs()
    inputs.pop('z')
    along_tokens = ('u', 'delta', 'B', 'C')
    flipped = {
        k: v.flip(1) if k in along_tokens else v for k, v in inputs.items()
    }
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
    sizes = dict(batch=1, length=5, dim=2, state=2)
    inputs = make_inputs(complex_a=complex_a, **sizes)
    leaves = [inputs[name].requires_grad_() for name in NAMES]

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
    sizes = dict(batch=batch, length=length, dim=dim, state=state)
    inputs = make_inputs(**sizes)
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


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('constant', [False, True])
@pytest.mark.parametrize('complex_a', [False, True])
def test_directions_are_scans(complex_a, constant, b_disc, backend):
    """Each as if alone, values and gradients, three with orders of theirs."""
    reverse = (True, False, True)
    together = convert(
        SCAN_DIRECTIONS.make(
            3,
            batch=2,
            length=37,
            complex_a=complex_a,
            constant='BC' if constant else '',
        ),
        torch.float64,
    )
    alone = [
        {k: v[i].clone().requires_grad_() for k, v in together.items()}
        for i in range(3)
    ]
    together = {k: v.requires_grad_() for k, v in together.items()}
    options = dict(delta_softplus=True, b_disc=b_disc, backend=backend)
    y = [
        selective_scan(**x, channels_last=True, reverse=order, **options)
        for x, order in zip(alone, reverse, strict=True)
    ]
    sum(out.sin().sum() for out in y).backward()
    stacked = selective_scan_directions(**together, reverse=reverse, **options)
    stacked.sin().sum().backward()
    assert torch.equal(stacked, torch.stack(y))
    for name, leaf in together.items():
        wanted = torch.stack([x[name].grad for x in alone])
        assert relative(leaf.grad, wanted) <= 1e-12, name


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
    u, delta, A, *_ = make_inputs(length=10).values()
    assert counts[0] == scan_flops(u, delta, A)
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


def test_names_are_checked():
    inputs = make_inputs()
    with pytest.raises(ValueError, match='b_disc must be one of'):
        selective_scan(**inputs, channels_last=True, b_disc='tustin')
    with pytest.raises(TypeError, match='unexpected keyword'):
        selective_scan(**inputs, softplus=True)


def test_groups_must_divide_the_channels():
    inputs = make_inputs(groups=4)
    with pytest.raises(ValueError, match=r'divides dim 6.*got \[4, 4\]'):
        selective_scan(**inputs, channels_last=True)
    inputs = make_inputs(groups=2) | {'C': make_inputs(groups=3)['C']}
    with pytest.raises(ValueError, match=r'the same number.*got \[2, 3\]'):
        selective_scan(**inputs, channels_last=True)


@pytest.mark.parametrize('groups', [(1, 3), (3, 1)])
def test_one_matrix_may_be_shared_by_all_groups(groups):
    inputs = SCAN_DIRECTIONS.make(batch=2, dim=6, groups=groups)
    SCAN_DIRECTIONS.check(
        convert(inputs, torch.float64), 'cpu', tolerance=1e-10
    )


def test_complex_matrices_belong_to_a_complex_a():
    inputs = make_inputs(complex_a=True)
    real_a = inputs | {'A': inputs['A'].real}
    with pytest.raises(TypeError, match='B must have a real floating'):
        selective_scan(**real_a, channels_last=True)
    real_b = inputs | {'B': inputs['B'].real}
    with pytest.raises(ValueError, match=r'B must be .* complex'):
        selective_scan(**real_b, channels_last=True)
