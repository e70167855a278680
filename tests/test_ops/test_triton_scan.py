"""The Triton backend against the definition, interpreted without a GPU.

On a machine with a GPU the same tests run compiled.
"""

import pytest
import torch
from operator_tester import (
    DEVICE,
    SCAN_DIRECTIONS,
    assert_equal,
    convert,
    copied,
    make_seed,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmstabvim.ops import selective_scan_directions
from mmstabvim.ops.selective_scan.function import scan_flops
from mmstabvim.ops.selective_scan.inputs import ScanInputs

triton = pytest.importorskip('triton')

from mmstabvim.ops.selective_scan import triton as backend  # noqa: E402

pytestmark = pytest.mark.usefixtures('fast_interpreter')

needs_gpu = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')


@pytest.fixture
def short_spans(monkeypatch):
    """Split the length of small inputs too."""
    monkeypatch.setattr(backend, 'SHORTEST_SPAN', 6)


def make_inputs(directions=1, **sizes):
    """Inputs by name, of one sample unless told."""
    defaults = dict(length=9, dim=5, state=3, device=DEVICE)
    return SCAN_DIRECTIONS.make(directions, **defaults | sizes)


def given(inputs, reverse=(True,), b_disc='euler', delta_softplus=True):
    return ScanInputs(
        **inputs,
        delta_softplus=delta_softplus,
        reverse=reverse,
        b_disc=b_disc,
    )


def run(inputs, seeds=None, **options):
    """Both outputs and the gradient of every input, by name."""
    return SCAN_DIRECTIONS.run(inputs, 'triton', seeds=seeds, **options)


def check(inputs, **options):
    """All results against the definition in float64."""
    SCAN_DIRECTIONS.check(inputs, 'triton', **options)


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('complex_a', [False, True])
def test_matches_reference(complex_a, b_disc):
    """Values and all gradients of both orders, the last state's included."""
    inputs = make_inputs(2, length=7, dim=4, groups=2, complex_a=complex_a)
    check(inputs, b_disc=b_disc, reverse=(False, True))


@pytest.mark.parametrize('length', [1, 2, 3, 5, 6, 7, 12, 65, 197])
def test_lengths(length):
    """Around one group and one chunk, and many with a rest."""
    check(make_inputs(length=length), reverse=(bool(length % 2),))


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize('state', [1, 2, 7, 16, 64])
def test_states_and_channel_blocks(state, complex_a):
    """Tails of both axes of the tile, and blocks of channels to sum over."""
    tile, _ = backend.tiles(state, 1 << 20, complex_a)
    dim = tile.DL * tile.DR + 1
    check(make_inputs(length=4, dim=dim, state=state, complex_a=complex_a))


@pytest.mark.parametrize('channels', [1, 2, 4, 32])
def test_whole_tiles(channels):
    """No masks; a group of channels may be smaller than a warp."""
    check(make_inputs(length=4, dim=2 * channels, state=16, groups=2))


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
    sizes = dict(batch=2, length=4, dim=6, groups=2, complex_a=complex_a)
    check(make_inputs(constant=constant, **sizes))


@pytest.mark.parametrize('groups', [(1, 3), (3, 1)])
def test_one_matrix_may_be_shared_by_all_groups(groups):
    check(make_inputs(batch=2, length=4, dim=6, groups=groups))


@pytest.mark.parametrize('absent', [('D',), ('delta_bias',)], ids=str)
def test_absent_inputs(absent):
    check(make_inputs(length=4, absent=absent))


def test_without_softplus():
    sizes = dict(length=4, absent=('delta_bias',), softplus=False)
    check(make_inputs(**sizes), delta_softplus=False)


@pytest.mark.parametrize(
    'reverse', [(True,), (True, False), (False, True, True)], ids=str
)
def test_directions_do_not_meet(reverse):
    """One launch gives what a launch of each direction would."""
    inputs = make_inputs(len(reverse), batch=2, length=4)
    together = run(inputs, reverse=reverse)
    seeds = {name: make_seed(together[name]) for name in ('y', 'last')}
    for k in range(len(reverse)):
        one, seed = (
            {name: x[k : k + 1] for name, x in arrays.items()}
            for arrays in (inputs, seeds)
        )
        alone = run(one, seed, reverse=reverse[k : k + 1])
        assert_equal({n: x[k : k + 1] for n, x in together.items()}, alone)


def test_a_reversed_direction_is_a_flip():
    """Bit for bit."""
    inputs = make_inputs(length=7)
    flipped = inputs | {n: inputs[n].flip(2) for n in ('u', 'delta', 'B', 'C')}
    y, last, _ = backend.forward(given(inputs, (False,)), False)
    y_flipped, last_flipped, _ = backend.forward(given(flipped), False)
    assert torch.equal(y_flipped.flip(2), y)
    assert torch.equal(last_flipped, last)


@pytest.mark.parametrize('complex_a', [False, True])
@pytest.mark.parametrize(('length', 'spans'), [(14, 2), (25, 3)])
def test_split_over_the_length(length, spans, complex_a, short_spans):
    """Spans of whole chunks and a rest, in both orders."""
    inputs = make_inputs(2, length=length, complex_a=complex_a)
    reverse = (False, True)
    assert backend._Call(given(inputs, reverse)).grid[1] == spans
    check(inputs, reverse=reverse)


def test_split_with_constant_matrices(short_spans):
    """Their gradients are summed over spans; decay from zoh."""
    check(make_inputs(length=14, constant='BC'), b_disc='zoh')


def test_split_without_gradient_of_the_last_state(short_spans):
    inputs = given(make_inputs(length=14))
    y, last, borders = backend.forward(inputs, True)
    dy = make_seed(y)
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
    inputs = given(make_inputs(batch=2, length=7, dim=6, groups=2))
    y, last, borders = backend.forward(inputs, True)
    assert borders.shape == (1, 2, 2, 6, 3)
    assert borders.shape == backend.borders_shape(inputs, True)
    bare = backend.forward(inputs, False)
    assert bare[2].shape == (1, 2, 0, 6, 3)
    assert bare[2].shape == backend.borders_shape(inputs, False)
    assert torch.equal(bare[0], y)
    assert torch.equal(bare[1], last)


@pytest.mark.parametrize('complex_a', [False, True])
def test_same_bits_of_spans(complex_a, short_spans):
    """From run to run."""
    inputs = make_inputs(length=14, dim=33, state=4, complex_a=complex_a)
    assert_equal(run(inputs), run(inputs))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('complex_a', [False, True])
def test_half_precision_inputs(dtype, complex_a):
    """Float32 inside, and one rounding of y, du and ddelta."""
    inputs = convert(make_inputs(batch=2, complex_a=complex_a), dtype)
    assert backend.output_dtype(given(inputs)) == dtype
    check(inputs)
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        return  # where the interpreter cuts digits off
    actual, single = run(inputs), run(convert(inputs, torch.float32))
    for name in ('y', 'du', 'ddelta'):
        assert torch.equal(actual[name], single[name].to(dtype)), name


@pytest.mark.parametrize('name', ['u', 'delta'])
def test_one_float32_among_half_precision_inputs(name):
    """Outputs keep the precision of the better of the two."""
    inputs = convert(make_inputs(length=4), torch.bfloat16)
    inputs[name] = inputs[name].float()
    assert backend.output_dtype(given(inputs)) == torch.float32
    check(inputs)


@pytest.mark.parametrize('complex_a', [False, True])
def test_unusual_strides(complex_a):
    """Tokens last, states of a wider tensor, a lazy conjugate."""
    inputs = make_inputs(
        batch=2, length=5, dim=6, groups=2, complex_a=complex_a
    )
    views = inputs | {
        'B': inputs['B'].movedim(2, 4).contiguous().movedim(4, 2),
        'C': torch.cat([inputs['C'], inputs['C']], dim=4)[..., :3],
    }
    if complex_a:
        views['A'] = inputs['A'].conj().resolve_conj().conj()
    assert not any(views[name].is_contiguous() for name in 'BC')
    assert_equal(run(views), run(inputs))


def test_slices_and_expanded_axes_are_not_copied():
    """A slice of a projection; u shared by directions, delta by samples."""
    inputs = make_inputs(2, batch=2, length=4, dim=6)
    pair = torch.cat([inputs['u'], inputs['delta']], dim=3)
    views = inputs | {
        'u': pair[:1, ..., :6].expand(2, -1, -1, -1),
        'delta': pair[:, :1, :, 6:].expand(-1, 2, -1, -1),
        'B': inputs['B'][:1, :1].expand(2, 2, -1, -1, -1),
    }
    arguments = backend._Call(given(views, (False, True))).arguments
    for name, x in (('u', pair), ('delta', pair[..., 6:])):
        assert arguments[f'{name}_ptr'].data_ptr() == x.data_ptr(), name
    assert arguments['B_ptr'].data_ptr() == inputs['B'].data_ptr()
    copies = {name: copied(x) for name, x in views.items()}
    assert_equal(run(views), run(copies))


def test_views_of_flat_parameters_are_not_copied():
    """(directions * dim, ...) as a layer keeps them."""
    inputs = make_inputs(2)
    flat = {n: inputs[n].flatten(0, 1) for n in ('A', 'D', 'delta_bias')}
    views = inputs | {n: x.unflatten(0, (2, 5)) for n, x in flat.items()}
    arguments = backend._Call(given(views, (False, True))).arguments
    for name, x in flat.items():
        pointer = arguments[f'{name.removeprefix("delta_")}_ptr']
        assert pointer.data_ptr() == x.data_ptr(), name


def test_tokens_out_of_reach_are_copied(monkeypatch):
    """32-bit offsets reach from one token to the next."""
    inputs = make_inputs(length=4)
    expected = run(inputs)
    monkeypatch.setattr(backend, 'MAX_STEP', 6)
    wide = torch.cat([inputs['u'], inputs['u']], dim=3)
    views = inputs | {'u': wide[..., :5]}
    u_ptr = backend._Call(given(views)).arguments['u_ptr']
    assert u_ptr.data_ptr() != wide.data_ptr()
    assert_equal(run(views), expected)


@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'C', 'D'])
@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_nan_stays_visible(name, b_disc):
    """And stays where it belongs."""
    inputs = make_inputs(length=2, dim=2, state=2)
    inputs[name].view(-1)[0] = float('nan')
    actual = run(inputs, b_disc=b_disc)
    exact = SCAN_DIRECTIONS.run(inputs, dtype=torch.float64, b_disc=b_disc)
    for key, wanted in exact.items():
        assert torch.equal(actual[key].isnan(), wanted.isnan()), key


@pytest.mark.parametrize('complex_a', [False, True])
def test_finite_differences(complex_a):
    """Of the forward kernel itself, along a random direction per input."""
    sizes = dict(length=4, dim=3, state=2, complex_a=complex_a)
    inputs, reverse = make_inputs(2, **sizes), (False, True)
    grads = run(inputs, reverse=reverse)
    seeds = {name: make_seed(grads[name]) for name in ('y', 'last')}

    def loss(name, x):
        y, last, _ = backend.forward(given(inputs | {name: x}, reverse), False)
        through_last = (last * seeds['last'].conj()).real
        return (y * seeds['y']).double().sum() + through_last.double().sum()

    step = 1e-2
    for name, x in inputs.items():
        direction = make_seed(x).flip(-1)
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
    inputs = given(make_inputs(length=24, dim=32, state=16))
    with LargestTensor() as largest:
        y, last, borders = backend.forward(inputs, True)
        backend.backward(y, last, borders, inputs)
    assert largest.nbytes == 24 // backend.CHUNK * 32 * 16 * 4


def refuse(error, message, directions=1, **sizes):
    inputs = make_inputs(directions, length=1, **sizes)
    options = dict(reverse=(False,) * directions, backend='triton')
    with pytest.raises(error, match=message):
        selective_scan_directions(**inputs, **options)


def test_too_many_states_are_refused():
    refuse(ValueError, r"64 states.*backend='cpu'", state=65)


def test_too_many_directions_are_refused():
    refuse(ValueError, '31 directions, got 32', 32, dim=1)


@pytest.mark.parametrize('name', ['u', 'A', 'delta_bias'])
def test_float64_is_refused(name):
    inputs = make_inputs()
    inputs[name] = inputs[name].double()
    with pytest.raises(TypeError, match=r"float64.*backend='cpu'"):
        selective_scan_directions(**inputs, reverse=(True,), backend='triton')


@pytest.mark.parametrize('complex_a', [False, True])
def test_flops_are_counted(complex_a):
    inputs = make_inputs(complex_a=complex_a)
    forward = scan_flops(inputs['u'], inputs['delta'], inputs['A'])
    with FlopCounterMode(display=False) as counter:
        run(inputs)
    assert counter.get_total_flops() == 4 * forward


def check_large(inputs, **options):
    """Against the ``cpu`` backend's float64, which is linear in memory."""
    exact = SCAN_DIRECTIONS.run(inputs, 'cpu', torch.float64, **options)
    plain = SCAN_DIRECTIONS.run(inputs, 'cpu', **options)
    actual = run(inputs, **options)
    SCAN_DIRECTIONS.assert_close(actual, plain, exact, 1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize('batch', [1, 8])
@pytest.mark.parametrize('length', [197, 1025, 4097])
def test_sizes_of_models(length, batch, dtype):
    sizes = dict(batch=batch, length=length, dim=384, state=16)
    inputs, reverse = convert(make_inputs(2, **sizes), dtype), (False, True)
    check_large(inputs, reverse=reverse)
    assert_equal(run(inputs, reverse=reverse), run(inputs, reverse=reverse))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_a_large_complex_scan(b_disc):
    sizes = dict(batch=2, length=1025, dim=384, state=16, complex_a=True)
    inputs = make_inputs(2, **sizes)
    check_large(inputs, b_disc=b_disc, reverse=(False, True))


@pytest.mark.gpu
@needs_gpu
def test_more_elements_than_32_bits_count():
    """The last samples as if they were alone."""
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip('needs 60 GB of free memory')
    batch, length, dim = 22000, 256, 384
    assert batch * length * dim > 2**31
    sizes = dict(batch=3, length=length, dim=dim, state=1)
    few = convert(make_inputs(**sizes), torch.bfloat16)

    def repeat(x):
        if x.dim() < 4:
            return x
        return x[:, :1].expand(-1, batch, *x.shape[2:]).contiguous()

    many = {name: repeat(x) for name, x in few.items()}
    for name in ('u', 'delta', 'B', 'C'):
        many[name][:, -3:] = few[name]
    results = {}
    for key, inputs in (('few', given(few)), ('many', given(many))):
        y, last, borders = backend.forward(inputs, True)
        dy = torch.zeros_like(y)
        dy[:, -3:] = make_seed(y[:, -3:])
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
