"""The Triton backend against the definition, interpreted without a GPU.

On a machine with a GPU the same tests run compiled.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import selective_scan
from mmstabvim.ops.selective_scan import cpu
from mmstabvim.ops.selective_scan.function import scan_flops
from mmstabvim.ops.selective_scan.inputs import ScanInputs
from mmstabvim.ops.selective_scan.reference import scan_ref

triton = pytest.importorskip('triton')

from mmstabvim.ops.selective_scan import triton as backend  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

pytestmark = pytest.mark.usefixtures('fast_interpreter')

needs_gpu = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')

TOLERANCE = 3e-6
"""Of an array's largest magnitude, as for the cpu backend."""

NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')


@pytest.fixture
def short_spans(monkeypatch):
    """Split the length of small inputs too."""
    monkeypatch.setattr(backend, 'SHORTEST_SPAN', 6)


def make_inputs(
    batch=1,
    length=9,
    dim=5,
    state=3,
    groups=1,
    complex_a=False,
    constant='',
    absent=(),
    reverse=(False,),
    softplus=True,
    b_disc='euler',
    dtype=torch.float32,
):
    """Inputs of the scan, reproducible; complex ones stay complex64."""
    generator = torch.Generator().manual_seed(length * 1000 + dim + state)
    directions = len(reverse)

    def normal(*shape):
        return torch.randn(directions, *shape, generator=generator)

    def wide(*shape):
        x = normal(*shape)
        return torch.complex(x, normal(*shape)) if complex_a else x

    def matrix(name):
        if name in constant:
            return wide(dim, state)
        return wide(batch, length, groups, state)

    A = -2 * torch.rand(directions, dim, state, generator=generator)
    tensors = dict(
        u=normal(batch, length, dim),
        delta=normal(batch, length, dim) - 1,
        A=torch.complex(A, 3 * normal(dim, state)) if complex_a else A,
        B=matrix('B'),
        C=matrix('C'),
        D=normal(dim),
        delta_bias=normal(dim),
    )
    given = {
        name: None
        if name in absent
        else x.to(DEVICE, x.dtype if x.is_complex() else dtype)
        for name, x in tensors.items()
    }
    return ScanInputs(*given.values(), softplus, reverse, b_disc)


def change(inputs, function):
    """The inputs with a function of every tensor."""
    changed = (None if x is None else function(x) for x in inputs.tensors)
    return ScanInputs(*changed, *inputs[7:])


def weights(shape, dtype):
    """What the outputs are multiplied with in the tests' loss."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.complex64 if dtype.is_complex else torch.float32
    x = torch.randn(shape, dtype=drawn, generator=generator)
    return x.to(DEVICE, dtype)


def direction(inputs, k):
    """One direction alone."""
    one = change(inputs, lambda x: x[k : k + 1])
    return one._replace(reverse=inputs.reverse[k : k + 1])


def run(inputs):
    """Both outputs and the gradient of every input, by name."""
    y, last, borders = backend.forward(inputs, True)
    dlast = weights(last.shape, last.dtype)
    dy = weights(y.shape, y.dtype)
    grads = backend.backward(dy, dlast, borders, inputs)
    names = ('y', 'last', *(f'd{name}' for name in NAMES))
    return dict(zip(names, (y, last, *grads), strict=True))


def run_exactly(inputs):
    """The same from the definition in float64."""
    narrow = backend.output_dtype(inputs)

    def leaf(x):
        wide = torch.complex128 if x.is_complex() else torch.float64
        return x.to(wide).detach().requires_grad_()

    leaves = change(inputs, leaf)
    y, last = scan_ref(leaves)
    dlast = weights(last.shape, last.dtype)
    loss = (y * weights(y.shape, narrow)).sum()
    (loss + (last * dlast.conj()).real.sum()).backward()
    grads = {
        f'd{name}': y.new_empty(0) if x is None else x.grad
        for name, x in zip(NAMES, leaves.tensors, strict=True)
    }
    return {'y': y.detach(), 'last': last.detach(), **grads}


def rounding_error(dtype):
    """Largest relative error of a rounding; interpreted, bfloat16 is cut."""
    cut = dtype == torch.bfloat16 and DEVICE == 'cpu'
    return torch.finfo(dtype).eps / (1 if cut else 2)


def check(inputs):
    """All results, to a rounding of their dtype where that is half."""
    actual = run(inputs)
    for name, exact in run_exactly(inputs).items():
        x = actual[name]
        assert x.shape == exact.shape, name
        if not exact.numel():
            continue
        bound = TOLERANCE * exact.abs().max()
        if x.dtype.itemsize == 2:
            info = torch.finfo(x.dtype)
            rounding = rounding_error(x.dtype) * (exact.abs() + bound)
            bound = bound + rounding.clamp(min=info.smallest_normal)
        excess = ((x - exact).abs() - bound).max()
        assert excess <= 0, f'{name}: {excess:.2e} beyond the bound'


def assert_equal(actual, wanted):
    for name, x in wanted.items():
        assert actual[name].dtype == x.dtype, name
        assert torch.equal(actual[name], x), name


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('complex_a', [False, True])
def test_matches_reference(complex_a, b_disc):
    """Values and all gradients of both orders, the last state's included."""
    check(
        make_inputs(
            length=7,
            dim=4,
            groups=2,
            complex_a=complex_a,
            reverse=(False, True),
            b_disc=b_disc,
        )
    )


@pytest.mark.parametrize('length', [1, 2, 3, 5, 6, 7, 12, 65, 197])
def test_lengths(length):
    """Around one group and one chunk, and many with a rest."""
    check(make_inputs(length=length, reverse=(bool(length % 2),)))


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize('state', [1, 2, 7, 16, 64])
def test_states_and_channel_blocks(state, complex_a):
    """Tails of both axes of the tile, and blocks of channels to sum over."""
    tile, _ = backend.tiles(state, 1 << 20, complex_a)
    dim = tile.DL * tile.DR + 1
    check(make_inputs(1, 4, dim, state, complex_a=complex_a))


@pytest.mark.parametrize('channels', [1, 2, 4, 32])
def test_whole_tiles(channels):
    """No masks; a group of channels may be smaller than a warp."""
    check(make_inputs(1, 4, 2 * channels, 16, groups=2))


@pytest.mark.parametrize('channels', [1, 3, 32, 384])
@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize('state', [1, 3, 16, 64])
def test_tiles_fit_a_warp(state, complex_a, channels):
    """The same numbers in both passes, all states, and no empty halves."""
    tiles = backend.tiles(state, channels, complex_a)
    sizes = set()
    for tile in tiles:
        assert state <= tile.NR * tile.NL < 2 * state
        assert tile.NL * tile.DL <= 32
        sizes.add(tile.DL * tile.DR)
    (block,) = sizes
    assert block < 2 * channels


@pytest.mark.parametrize('constant', ['B', 'C', 'BC'])
@pytest.mark.parametrize('complex_a', [False, True])
def test_constant_matrices(constant, complex_a):
    inputs = make_inputs(
        2, 4, 6, groups=2, constant=constant, complex_a=complex_a
    )
    check(inputs)


@pytest.mark.parametrize('grouped', 'BC')
def test_one_matrix_may_be_shared_by_all_groups(grouped):
    groups = make_inputs(2, 4, 6, groups=3)
    shared = make_inputs(2, 4, 6)
    check(shared._replace(**{grouped: getattr(groups, grouped)}))


@pytest.mark.parametrize('absent', [('D',), ('delta_bias',)], ids=str)
def test_absent_inputs(absent):
    check(make_inputs(length=4, absent=absent))


def test_without_softplus():
    inputs = make_inputs(length=4, softplus=False)
    check(inputs._replace(delta=inputs.delta.abs(), delta_bias=None))


@pytest.mark.parametrize(
    'reverse', [(True,), (True, False), (False, True, True)], ids=str
)
def test_directions_do_not_meet(reverse):
    """One launch gives what a launch of each direction would."""
    inputs = make_inputs(2, 4, 5, reverse=reverse)
    together = run(inputs)
    y, last, borders = backend.forward(inputs, True)
    dy, dlast = (weights(x.shape, x.dtype) for x in (y, last))
    for k in range(len(reverse)):
        alone = direction(inputs, k)
        y, last, borders = backend.forward(alone, True)
        grads = backend.backward(
            dy[k : k + 1], dlast[k : k + 1], borders, alone
        )
        for name, x in zip(together, (y, last, *grads), strict=True):
            assert torch.equal(together[name][k : k + 1], x), name


def test_a_reversed_direction_is_a_flip():
    """Bit for bit."""
    inputs = make_inputs(length=7)
    flipped = inputs._replace(
        u=inputs.u.flip(2),
        delta=inputs.delta.flip(2),
        B=inputs.B.flip(2),
        C=inputs.C.flip(2),
        reverse=(True,),
    )
    y, last, _ = backend.forward(inputs, False)
    y_flipped, last_flipped, _ = backend.forward(flipped, False)
    assert torch.equal(y_flipped.flip(2), y)
    assert torch.equal(last_flipped, last)


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize(('length', 'spans'), [(14, 2), (25, 3)])
def test_split_over_the_length(length, spans, complex_a, short_spans):
    """Spans of whole chunks and a rest, in both orders."""
    inputs = make_inputs(
        length=length, complex_a=complex_a, reverse=(False, True)
    )
    assert backend._Call(inputs).grid[1] == spans
    check(inputs)


def test_split_with_constant_matrices(short_spans):
    """Their gradients are summed over spans; decay from zoh."""
    check(make_inputs(length=14, constant='BC', b_disc='zoh'))


def test_split_without_gradient_of_the_last_state(short_spans):
    inputs = make_inputs(length=14)
    y, last, borders = backend.forward(inputs, True)
    dy = weights(y.shape, y.dtype)
    absent = backend.backward(dy, None, borders, inputs)
    zero = backend.backward(dy, torch.zeros_like(last), borders, inputs)
    assert all(map(torch.equal, absent, zero))


@pytest.mark.parametrize(
    ('programs', 'length', 'spans'),
    [
        (backend.ENOUGH_PROGRAMS, 4097, 1),
        (backend.ENOUGH_PROGRAMS - 1, 4097, 3),
        (24, 4096, 63),
        (24, 197, 3),
        (1, 127, 1),
        (1, 1, 1),
    ],
)
def test_spans(programs, length, spans):
    """Whole chunks, as few as are enough, none without a token."""
    span = backend.span_length(programs, length)
    assert span % backend.CHUNK == 0
    assert triton.cdiv(length, span) == spans
    assert spans == 1 or span >= backend.SHORTEST_SPAN


def test_states_are_kept_on_demand_only():
    inputs = make_inputs(2, 7, 6, groups=2)
    y, last, borders = backend.forward(inputs, True)
    assert borders.shape == (1, 2, 2, 6, 3)
    assert borders.shape == backend.borders_shape(inputs, True)
    bare = backend.forward(inputs, False)
    assert bare[2].shape == (1, 2, 0, 6, 3)
    assert bare[2].shape == backend.borders_shape(inputs, False)
    assert torch.equal(bare[0], y)
    assert torch.equal(bare[1], last)


@pytest.mark.parametrize('complex_a', [False, True])
def test_same_bits(complex_a, short_spans):
    """From run to run."""
    inputs = make_inputs(1, 14, 33, 4, complex_a=complex_a)
    assert_equal(run(inputs), run(inputs))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('complex_a', [False, True])
def test_half_precision_inputs(dtype, complex_a):
    """Float32 inside, and one rounding of y, du and ddelta."""
    inputs = make_inputs(2, 7, 5, groups=1, complex_a=complex_a, dtype=dtype)
    assert backend.output_dtype(inputs) == dtype
    check(inputs)


@pytest.mark.parametrize('name', ['u', 'delta'])
def test_one_float32_among_half_precision_inputs(name):
    """Outputs keep the precision of the better of the two."""
    inputs = make_inputs(length=4, dtype=torch.bfloat16)
    inputs = inputs._replace(**{name: getattr(inputs, name).float()})
    assert backend.output_dtype(inputs) == torch.float32
    actual = run(inputs)
    assert {actual[x].dtype for x in ('y', 'du', 'ddelta')} == {torch.float32}
    check(inputs)


@pytest.mark.parametrize('complex_a', [False, True])
def test_non_contiguous(complex_a):
    """Strides are respected, or removed by a copy; so is a lazy conjugate."""
    inputs = make_inputs(2, 5, 6, groups=2, complex_a=complex_a)
    views = change(
        inputs, lambda x: torch.stack([x, torch.full_like(x, 9)], -1)[..., 0]
    )
    padded = torch.cat([inputs.C, inputs.C], dim=4)[..., :3]
    tokens_last = inputs.B.movedim(2, 4).contiguous().movedim(4, 2)
    views = views._replace(B=tokens_last, C=padded)
    if complex_a:
        views = views._replace(A=inputs.A.conj().resolve_conj().conj())
    assert not any(x.is_contiguous() for x in (views.u, views.B, views.C))
    assert_equal(run(views), run(inputs))


def test_slices_and_expanded_axes_are_not_copied():
    """A slice of a projection; u shared by directions, delta by samples."""
    inputs = make_inputs(2, 4, 6, reverse=(False, True))
    pair = torch.cat([inputs.u, inputs.delta], dim=3)
    views = inputs._replace(
        u=pair[:1, ..., :6].expand(2, -1, -1, -1),
        delta=pair[:, :1, :, 6:].expand(-1, 2, -1, -1),
        B=inputs.B[:1, :1].expand(2, 2, -1, -1, -1),
    )
    arguments = backend._Call(views).arguments
    for name, x in (('u', pair), ('delta', pair[..., 6:]), ('B', inputs.B)):
        assert arguments[f'{name}_ptr'].data_ptr() == x.data_ptr(), name
    dy = weights((1, 2, 4, 6), torch.float32).expand(2, -1, -1, -1)
    results = []
    for given, gradient in (
        (views, dy),
        (change(views, torch.Tensor.contiguous), dy.contiguous()),
    ):
        y, last, borders = backend.forward(given, True)
        grads = backend.backward(gradient, None, borders, given)
        results.append((y, last, *grads))
    assert all(map(torch.equal, *results))


def test_tokens_out_of_reach_are_copied(monkeypatch):
    """32-bit offsets reach from one token to the next."""
    inputs = make_inputs(length=4)
    expected = run(inputs)
    monkeypatch.setattr(backend, 'MAX_STEP', 6)
    wide = torch.cat([inputs.u, inputs.u], dim=3)
    views = inputs._replace(u=wide[..., :5])
    u_ptr = backend._Call(views).arguments['u_ptr']
    assert u_ptr.data_ptr() != wide.data_ptr()
    assert_equal(run(views), expected)


@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'C', 'D'])
@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_nan_stays_visible(name, b_disc):
    """And stays where it belongs."""
    inputs = make_inputs(length=2, dim=2, state=2, b_disc=b_disc)
    getattr(inputs, name).view(-1)[0] = float('nan')
    actual = run(inputs)
    for key, exact in run_exactly(inputs).items():
        assert torch.equal(actual[key].isnan(), exact.isnan()), key


@pytest.mark.parametrize('complex_a', [False, True])
def test_finite_differences(complex_a):
    """Of the forward kernel itself, along a random direction per input."""
    inputs = make_inputs(
        length=4, dim=3, state=2, complex_a=complex_a, reverse=(False, True)
    )
    grads = run(inputs)
    y, last, _ = backend.forward(inputs, False)
    dy, dlast = (weights(x.shape, x.dtype) for x in (y, last))

    def loss(name, x):
        y, last, _ = backend.forward(inputs._replace(**{name: x}), False)
        through_last = (last * dlast.conj()).real
        return (y * dy).double().sum() + through_last.double().sum()

    step = 1e-2
    for name, x in zip(NAMES, inputs.tensors, strict=True):
        direction = weights(x.shape, x.dtype).flip(-1)
        after = loss(name, x + step * direction)
        before = loss(name, x - step * direction)
        slope = (grads[f'd{name}'] * direction.conj()).real.sum()
        scale = (grads[f'd{name}'].abs() * direction.abs()).sum()
        error = (after - before) / (2 * step) - slope
        assert error.abs() <= 1e-3 * scale, name


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
    """The chunks' borders are the largest."""
    inputs = make_inputs(1, 24, 32, 16)
    with LargestTensor() as largest:
        run(inputs)
    assert largest.nbytes == 24 // backend.CHUNK * 32 * 16 * 4


@pytest.mark.parametrize('name', ['u', 'A', 'delta_bias'])
def test_float64_is_refused(name):
    inputs = make_inputs()
    inputs = inputs._replace(**{name: getattr(inputs, name).double()})
    with pytest.raises(TypeError, match=r"float64.*backend='cpu'"):
        backend.forward(inputs, False)


def test_too_many_states_are_refused():
    inputs = make_inputs(length=1, state=65)
    with pytest.raises(ValueError, match=r"64 states.*backend='cpu'"):
        backend.forward(inputs, False)


def test_too_many_directions_are_refused():
    inputs = make_inputs(length=1, dim=1, reverse=(False,) * 32)
    with pytest.raises(ValueError, match='31 directions, got 32'):
        backend.forward(inputs, False)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    inputs = change(make_inputs(), torch.Tensor.cpu)
    monkeypatch.setattr(triton.knobs.runtime, 'interpret', False)
    with pytest.raises(RuntimeError, match='needs a GPU'):
        backend.forward(inputs, False)


@pytest.mark.parametrize('complex_a', [False, True])
def test_public_function(complex_a):
    """By its name, in the public layout, and counted."""
    inputs = make_inputs(complex_a=complex_a)
    u, delta, A, B, C, D, bias = (x[0] for x in inputs.tensors)
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


def check_large(inputs):
    """Against the ``cpu`` backend's float64, which is linear in memory."""
    wide = change(
        inputs,
        lambda x: x.to(torch.complex128 if x.is_complex() else torch.float64),
    )
    actual = run(inputs)
    y, last, borders = cpu.forward(wide, True)
    dy = weights(y.shape, backend.output_dtype(inputs)).double()
    dlast = weights(last.shape, last.dtype)
    grads = cpu.backward(dy, dlast, borders, wide)
    for (name, x), exact in zip(
        actual.items(), (y, last, *grads), strict=True
    ):
        bound = 1e-5 * exact.abs().max()
        if x.dtype.itemsize == 2:
            bound = bound + rounding_error(x.dtype) * exact.abs()
        excess = ((x - exact).abs() - bound).max()
        assert excess <= 0, f'{name}: {excess:.2e} beyond the bound'


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize('batch', [1, 8])
@pytest.mark.parametrize('length', [197, 1025, 4097])
def test_sizes_of_models(length, batch, dtype):
    inputs = make_inputs(
        batch, length, 384, 16, reverse=(False, True), dtype=dtype
    )
    check_large(inputs)
    assert_equal(run(inputs), run(inputs))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_a_large_complex_scan(b_disc):
    inputs = make_inputs(
        2, 1025, 384, 16, complex_a=True, reverse=(False, True), b_disc=b_disc
    )
    check_large(inputs)


@pytest.mark.gpu
@needs_gpu
def test_more_elements_than_32_bits_count():
    """The last samples as if they were alone."""
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip('needs 60 GB of free memory')
    batch, length, dim = 22000, 256, 384
    assert batch * length * dim > 2**31
    few = make_inputs(3, length, dim, 1, dtype=torch.bfloat16)

    def repeat(x):
        if x.dim() < 4:
            return x
        return x[:, :1].expand(-1, batch, *x.shape[2:]).contiguous()

    many = change(few, repeat)
    for name in ('u', 'delta', 'B', 'C'):
        getattr(many, name)[:, -3:] = getattr(few, name)
    results = {}
    for key, inputs in (('few', few), ('many', many)):
        y, last, borders = backend.forward(inputs, True)
        dy = torch.zeros_like(y)
        dy[:, -3:] = weights(y[:, -3:].shape, y.dtype)
        grads = backend.backward(dy, None, borders, inputs)
        du, ddelta, _, dB, dC = grads[:5]
        samples = (y, last, du, ddelta, dB, dC)
        results[key] = [x[:, -3:].clone() for x in samples]
    # one span or several: the programs are not as many
    for x, alone in zip(results['many'], results['few'], strict=True):
        bound = 1e-5 * alone.abs().max()
        if x.dtype.itemsize == 2:
            bound = bound + torch.finfo(x.dtype).eps * alone.abs()
        assert ((x - alone).abs() <= bound).all()
