"""Bounds hold for everything found, and are attained where they can be."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmstabvim.layers import MambaMixer, RMSNorm
from mmstabvim.layers.mixer_ranges import (
    DIRECTED,
    FLOAT32,
    SHARED,
    certify_mixer,
    largest_values,
    trace_mixer,
)
from mmstabvim.layers.state_matrix import Full
from mmstabvim.stability.ranges.certified import (
    Interval,
    NormedLinear,
    ScanInput,
    affine_range,
    mode_gain,
    rounding_slack,
    scan_ranges,
    silu_range,
    step_gain,
)

DOUBLE = dict(dtype=torch.float64)
CLOSE = dict(rtol=1e-9, atol=1e-9)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, **DOUBLE)


def scan_input(width=3, slack=0.0):
    """Five channels of tokens with four."""
    x = NormedLinear(normal(5, 4), normal(4, seed=1))
    bias = 0.3 * normal(5, seed=3)
    return ScanInput(x, normal(5, width, seed=2), bias, slack)


def on_sphere(tokens):
    return F.normalize(tokens, dim=-1) * math.sqrt(tokens.shape[-1])


# ----------------------------------------------------------- pure functions


def test_silu_range():
    low = torch.tensor([-9.0, -5.0, -1.0, -3.0, 1.0], **DOUBLE)
    high = torch.tensor([-5.0, 4.0, 0.5, -1.3, 2.0], **DOUBLE)
    found = silu_range(Interval(low, high))
    grid = low + (high - low) * torch.linspace(0, 1, 20001, **DOUBLE)[:, None]
    seen = F.silu(grid)
    torch.testing.assert_close(found.low, seen.amin(0), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.high, seen.amax(0), **CLOSE)
    assert (found.low <= seen.amin(0)).all()


def test_affine_range_is_attained_at_corners():
    box = Interval(-normal(4).abs(), normal(4, seed=1).abs())
    weight = normal(3, 4, seed=2)
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], **DOUBLE)] * 4)
    images = (box.low + bits * (box.high - box.low)) @ weight.T
    found = affine_range(weight, box)
    torch.testing.assert_close(found.low, images.amin(0), **CLOSE)
    torch.testing.assert_close(found.high, images.amax(0), **CLOSE)


def test_normed_linear_is_attained():
    layer = NormedLinear(normal(5, 4), normal(4, seed=1))
    best = on_sphere(layer.gain)  # each row's own worst token
    seen = (best * layer.gain).sum(1)
    torch.testing.assert_close(layer.outputs, seen, **CLOSE)
    any_token = on_sphere(normal(2000, 4, seed=5)) @ layer.gain.T
    assert (any_token.abs() <= layer.outputs).all()


def test_convolution_and_silu_are_attained():
    given = scan_input()
    x = given.x.outputs
    for sign, ends in ((1, 'high'), (-1, 'low')):
        tokens = sign * given.taps.sign() * x[:, None]
        seen = given.bias + (given.taps * tokens).sum(1)
        found = getattr(given.before_silu, ends)
        torch.testing.assert_close(found, seen, **CLOSE)
    assert torch.equal(given.u.high, F.silu(given.before_silu.high))
    assert (given.u.low >= -0.2784645427610739).all()


def test_projection_holds_for_the_worst_tokens_found():
    given = scan_input()
    weight, left = normal(2, 5, seed=7), normal(6, 2, seed=8)
    found = given.projected(weight, left)
    product = left @ weight
    tokens = normal(6, 8, 3, 4, seed=9).requires_grad_()
    optimizer = torch.optim.Adam([tokens], lr=0.1)
    best = torch.full((6,), -math.inf, **DOUBLE)
    norm = torch.zeros(())
    for _ in range(150):
        x = on_sphere(tokens) @ given.x.gain.T  # (rows, starts, taps, dim)
        u = F.silu(given.bias + (given.taps.T * x).sum(2))
        values = u @ product.T  # (rows, starts, rows)
        seen = values.diagonal(dim1=0, dim2=2).T
        best = torch.maximum(best, seen.detach().amax(1))
        norm = torch.maximum(norm, values.detach().norm(dim=-1).max())
        optimizer.zero_grad()
        (-seen.sum()).backward()
        optimizer.step()
    assert (best <= found.high + 1e-9).all()
    assert (best >= 0.4 * found.high).all()
    whole = given.projected_norm(weight, left)
    assert norm <= whole <= found.magnitude.norm() + 1e-9
    assert norm >= 0.4 * whole


def test_a_wide_projection_beats_the_box():
    """With many channels signs cancel, which a box does not know."""
    dim = 256
    x = NormedLinear(normal(dim, 64) / 8, torch.ones(64, **DOUBLE))
    bias = 0.3 * normal(dim, seed=2)
    given = ScanInput(x, 0.5 * normal(dim, 4, seed=1), bias)
    weight = normal(8, dim, seed=3) / 16
    found = given.projected(weight).magnitude
    box = affine_range(weight, given.u).magnitude
    assert (found < 0.5 * box).all()
    assert given.projected_norm(weight) < 0.8 * found.norm()


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_gain_of_a_mode_is_attained(b_disc):
    """A constant drive, largest steps, many tokens."""
    real = torch.tensor([-0.5, -1.0, -16.0], **DOUBLE)
    delta = torch.tensor(0.1, **DOUBLE)
    gain, step = mode_gain(real, delta, b_disc), step_gain(real, delta, b_disc)
    state = torch.zeros(3, **DOUBLE)
    for _ in range(1000):
        state = torch.exp(delta * real) * state + step
    torch.testing.assert_close(gain, state, **CLOSE)
    if b_disc == 'euler':
        wanted = torch.tensor([1.0508331945, 0.1252970351], **DOUBLE)
        torch.testing.assert_close(gain[1:], wanted, **CLOSE)
        assert (gain <= -1 / real + delta).all()
    # a mode that does not decay has no bound, without a step none is needed
    assert mode_gain(0 * real, delta, b_disc).isinf().all()
    assert mode_gain(real, 0 * delta, b_disc).allclose(-1 / real)
    tiny = mode_gain(real * 1e-320, delta, b_disc)
    assert not tiny.isnan().any()


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('kind', ['real', 'complex'])
def test_scan_obeys_its_ranges(kind, b_disc):
    """Random steps, inputs, B and C below their largest values."""
    A = -normal(3, 4).abs()
    A = torch.complex(A, 3 * normal(3, 4, seed=1)) if kind == 'complex' else A
    u, delta, D = (normal(3, seed=s).abs() for s in (2, 3, 4))
    B, C = (normal(3, 4, seed=s).abs() for s in (5, 6))
    found = scan_ranges(u, delta, A, B, C, D, b_disc)
    state = torch.zeros_like(A)
    largest = torch.zeros(3, **DOUBLE)
    angle = (A.to(torch.complex128) * delta[:, None]).imag
    for t in range(300):
        share = 1 - 0.2 * torch.rand(
            3, generator=torch.Generator().manual_seed(t), **DOUBLE
        )
        step = (delta * share)[:, None]
        # the phase that the state has reached
        turn = torch.exp(1j * angle * t) if kind == 'complex' else 1.0
        gain = (torch.exp(step * A) - 1) / A if b_disc == 'zoh' else step
        drive = gain * B * turn * (u * share)[:, None]
        assert (drive.abs() <= found.drive * (1 + 1e-12)).all()
        state = torch.exp(step * A) * state + drive
        assert (state.abs() <= found.state * (1 + 1e-12)).all()
        read = (C * state.abs()).sum(1) * (2 if kind == 'complex' else 1)
        largest = torch.maximum(largest, read + D * u * share)
    assert (largest <= found.y).all()
    if kind == 'real':
        assert (largest > 0.6 * found.y).all()


def test_no_drive_no_state_and_never_a_nan():
    A = torch.tensor([[-1.0, 0.5], [0.0, -1.0]], **DOUBLE)
    one = torch.ones(2, **DOUBLE)
    B = torch.tensor([[1.0, 0.0], [1.0, 1.0]], **DOUBLE)
    C = torch.tensor([[1.0, 1.0], [0.0, 1.0]], **DOUBLE)
    found = scan_ranges(one, one, A, B, C, 0 * one)
    assert found.state[0, 1] == 0
    assert found.state[1, 0] == math.inf
    assert found.y.isfinite().all()  # the growing mode is not read


def test_rounding():
    assert rounding_slack(0.0, 1000) == 0
    half = rounding_slack(2.0**-11, 1000)
    assert 12 * 2.0**-11 < half < 0.01
    exact, rounded = scan_input(), scan_input(slack=half)
    weight = normal(6, 5, seed=8)
    assert (rounded.u.high > exact.u.high).all()
    pair = exact.projected(weight), rounded.projected(weight)
    assert (pair[1].high > pair[0].high).all()
    assert rounded.projected_norm(weight) > exact.projected_norm(weight)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r'scale \(d_model,\), got'):
        NormedLinear(normal(5, 4), normal(5))
    with pytest.raises(ValueError, match=r'taps must be \(5, width\)'):
        ScanInput(scan_input().x, normal(4, 3), normal(5))
    with pytest.raises(ValueError, match='b_disc must be one of'):
        mode_gain(normal(1), normal(1), 'foh')


# ------------------------------------------------------------------- mixers

MATRICES = {
    'neg_exp': dict(type='neg_exp'),
    'signed': dict(type='signed'),
    'complex': dict(type='complex'),
    'complex, free': dict(type='complex', real_part='free', init='s4d_legs'),
    'ptd': dict(type='complex', init='ptd', hippo_bias=True),
    'full': dict(type='full', groups=2),
    'full, not normal': dict(type='full', groups=2, init='ptd'),
    'full, wide': dict(type='full', init='hippo', kappa_max=20.0),
}
# the scan has no states of its own
EXPONENTIAL = dict(type='full', init='hippo', kappa_max=1.0)


def make_mixer(state_matrix, b_disc='euler', seed=0):
    """A mixer in double precision with rough weights."""
    torch.manual_seed(seed)
    mixer = MambaMixer(
        4,
        d_state=4,
        d_conv=3,
        dt_rank=2,
        state_matrix=state_matrix,
        b_disc=b_disc,
        backend='reference',
    )
    norm = RMSNorm(4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        mixer.ssm.x_proj.weight.mul_(2)
        mixer.ssm.dt_bias.add_(2)
    return mixer.double(), norm.double()


def ascend(mixer, norm, pick, steps=25, length=7):
    """Largest values on the way up of ``pick(trace)``."""
    tokens = normal(3, length, 4, seed=4).requires_grad_()
    optimizer = torch.optim.Adam([tokens], lr=0.2)
    largest = None
    for _ in range(steps):
        trace = trace_mixer(mixer, on_sphere(tokens) * norm.weight.detach())
        seen = largest_values(trace)
        largest = [
            {
                name: max(value, old.get(name, 0.0))
                for name, value in new.items()
            }
            for new, old in zip(seen, largest or [{}] * 3, strict=True)
        ]
        optimizer.zero_grad()
        (-pick(trace).abs().flatten(1).amax(1).log().sum()).backward()
        optimizer.step()
    return largest


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('kind', MATRICES)
def test_never_violated_by_gradient_ascent(kind, b_disc):
    """On the normalized tokens, for output, state and step size."""
    bounds, found = climb(MATRICES[kind], b_disc, 'state')
    for bound, seen in zip(bounds, found, strict=True):
        assert bound.keys() == seen.keys()


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_never_violated_without_an_eigenbasis(b_disc, monkeypatch):
    """Scans that run by the matrix exponential."""
    monkeypatch.setattr(Full, '_kind', lambda *_: 2)
    bounds, found = climb(EXPONENTIAL, b_disc, 'y')
    assert 'state' not in found[1]
    assert all(math.isfinite(bound['y']) for bound in bounds[1:])


def climb(state_matrix, b_disc, tensor):
    """Bounds, and the largest values seen on three ways up; compared."""
    mixer, norm = make_mixer(state_matrix, b_disc)
    bounds = largest_values(certify_mixer(mixer, norm, None))
    for pick in (
        lambda trace: trace.shared['out'],
        lambda trace: trace.directions[0][tensor],
        lambda trace: trace.directions[1]['delta'],
    ):
        found = ascend(mixer, norm, pick)
        for bound, seen in zip(bounds, found, strict=True):
            for name, value in seen.items():
                assert value <= bound[name] * (1 + 1e-6), name
    assert found[2]['delta'] > 0.4 * bounds[2]['delta']
    return bounds, found


def test_names():
    mixer, norm = make_mixer(MATRICES['neg_exp'])
    bounds = certify_mixer(mixer, norm)
    assert set(bounds.shared) == set(SHARED)
    assert [tuple(d) for d in bounds.directions] == [DIRECTED] * 2


@pytest.mark.parametrize('kind', MATRICES)
def test_trace_is_the_mixer(kind):
    mixer, _ = make_mixer(MATRICES[kind], 'zoh')
    tokens = normal(2, 5, 4)
    trace = trace_mixer(mixer, tokens)
    torch.testing.assert_close(trace.shared['out'], mixer(tokens), **CLOSE)
    found = trace.directions
    B, C = (torch.stack([one[name] for one in found]) for name in 'BC')
    system = mixer.ssm.state_matrix.scan_matrices(B, C)
    C = system.C.repeat_interleave(8 // system.C.shape[3], dim=3)
    skips = mixer.ssm.by_direction(mixer.ssm.D)
    for found, read_by, D in zip(trace.directions, C, skips, strict=True):
        read = (read_by * found['state']).sum(-1)
        read = 2 * read.real if read.is_complex() else read
        y = read + D * found['u']
        torch.testing.assert_close(found['y'], y, rtol=1e-5, atol=1e-6)


def one_channel(d_state=1, **options):
    """A mixer in which nothing can cancel."""
    mixer = MambaMixer(
        1, d_state, d_conv=1, expand=1, backend='reference', **options
    ).double()
    norm = RMSNorm(1).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(0.9)
    return mixer, norm


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('kind', ['neg_exp', 'signed'])
def test_one_channel_attains_every_bound(kind, b_disc):
    mixer, norm = one_channel(state_matrix=dict(type=kind), b_disc=b_disc)
    if kind == 'signed':
        mixer.ssm.state_matrix.A.data.fill_(-0.7)
    bounds = largest_values(certify_mixer(mixer, norm, None))
    with torch.no_grad():
        image = norm(torch.full((1, 400, 1), 1e6, **DOUBLE))
        found = largest_values(trace_mixer(mixer, image))
    for bound, seen in zip(bounds, found, strict=True):
        assert bound.keys() == seen.keys()
        for name, value in bound.items():
            assert seen[name] == pytest.approx(value, rel=1e-9), name


def test_an_unstable_mode_has_no_bound():
    mixer, norm = one_channel(state_matrix=dict(type='signed'))
    shared, forward, backward = largest_values(certify_mixer(mixer, norm))
    assert forward['state'] == forward['y'] == math.inf
    assert shared['out'] == backward['y'] == math.inf
    assert math.isfinite(forward['drive'])
    assert math.isfinite(forward['delta'])


def test_without_an_eigenbasis(monkeypatch):
    """The logarithmic norm bounds what the matrix exponential computes.

    B and C are along the slowest direction: all but attained.
    """
    options = dict(type='full', rank=0, kappa_max=1.0)
    mixer, norm = one_channel(2, state_matrix=options)
    block = torch.tensor([[-0.7, 0.201], [0.199, -0.7]])
    with torch.no_grad():
        mixer.ssm.state_matrix.blocks.copy_(block.expand(2, 1, 2, 2))
    monkeypatch.setattr(Full, '_kind', lambda *_: 2)
    bounds = largest_values(certify_mixer(mixer, norm, None))
    with torch.no_grad():
        tokens = norm(torch.full((1, 60, 1), 1e6, **DOUBLE))
        found = largest_values(trace_mixer(mixer, tokens))
    for bound, seen in zip(bounds, found, strict=True):
        assert 'state' not in seen
        for name, value in seen.items():
            assert 0.9999 * bound[name] <= value, name
            assert value <= bound[name] * (1 + 1e-6), name


@pytest.mark.parametrize('kind', MATRICES)
def test_what_autocast_keeps_in_float32(kind):
    mixer, norm = make_mixer(MATRICES[kind])
    mixer, tokens = mixer.float(), norm.float()(normal(1, 3, 4).float())
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        shared, *directions = trace_mixer(mixer, tokens)
    del shared['normed']  # on a GPU only
    assert {x.dtype for x in shared.values()} == {torch.bfloat16}
    for name, tensor in (item for d in directions[0] for item in d.items()):
        wide = name in FLOAT32
        wanted = torch.float32 if wide else torch.bfloat16
        if kind == 'full, wide' and name in ('drive', 'state'):
            wanted = torch.float64  # its eigenvectors need complex128
        assert tensor.dtype.to_real() == wanted, name


def test_a_weight_that_is_not_finite():
    mixer, norm = make_mixer(MATRICES['neg_exp'])
    mixer.out_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r'out_proj\.weight has a NaN'):
        certify_mixer(mixer, norm)
