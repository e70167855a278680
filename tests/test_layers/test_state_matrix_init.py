"""Where state matrices start: values, the layers they give, bad options."""

import math

import pytest
import torch

from mmstabvim.layers import MambaMixer, ScanOrder, SelectiveSSM
from mmstabvim.layers.state_matrix import (
    INITS,
    STATE_MATRICES,
    EigenvalueClamping,
    SpectralNormalization,
    build_state_matrix,
    initialization,
)
from mmstabvim.layers.state_matrix.fixed_basis import as_complex
from mmstabvim.stability import (
    S4D_PAIRS,
    Perturbation,
    hippo_legs,
    legs_normal_form,
    perturb_then_diagonalize,
    s4d_legs_input,
)
from mmstabvim.stability.state.eigenbasis import (
    COMPLEX64,
    matrix_exponential_scan,
)

PAIRS = tuple(S4D_PAIRS)
FITTING = [(type, init) for init, types in INITS.items() for type in types]
OTHERS = [
    (type, init)
    for init in INITS
    for type in STATE_MATRICES
    if type not in INITS[init]
]


@pytest.fixture
def in_double():
    """Models in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(d_state=8, d_inner=4, **options):
    torch.manual_seed(0)
    return build_state_matrix(d_inner, d_state, **options)


def assert_same_values(found, wanted, atol):
    """As sets, row by row."""
    found, wanted = (x.to(torch.complex128) for x in (found, wanted))
    for row in found:
        gap = (row[:, None] - wanted).abs()
        assert gap.amin(0).max() <= atol
        assert gap.amin(1).max() <= atol


# --------------------------------------------------- what was there before


def test_defaults_are_what_they_were():
    """The same bits, and the same draws of the random generator."""
    modes = torch.arange(1, 9, dtype=torch.float32)
    assert torch.equal(build().A_log, modes.log().repeat(4, 1))
    assert torch.equal(build(type='signed').A, -modes.repeat(4, 1))
    complex_, free = (
        build(type='complex', real_part=part) for part in ('neg_exp', 'free')
    )
    half = torch.full((4, 8), 0.5)
    assert torch.equal(complex_.log_re, half.log())
    assert torch.equal(free.re, -half)
    assert torch.equal(complex_.im, math.pi * (modes - 1).repeat(4, 1))
    full = build(type='full', groups=2)
    blocks = torch.diag_embed(-modes.unflatten(0, (-1, 2)))
    assert torch.equal(full.blocks, blocks.repeat(2, 1, 1, 1))
    assert not full.U.any()
    torch.manual_seed(0)
    assert torch.equal(full.V, 0.1 * 8**-0.5 * torch.randn(2, 8, 1))


@pytest.mark.parametrize(
    ('type', 'names'),
    [
        ('neg_exp', ['A_log']),
        ('signed', ['A']),
        ('complex', ['log_re', 'im']),
        ('full', ['blocks', 'U', 'V']),
    ],
)
def test_checkpoints_are_what_they_were(type, names):
    assert list(build(type=type).state_dict()) == names


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(('type', 'init'), FITTING)
@pytest.mark.parametrize('d_state', [2, 8, 16])
def test_starts_stable(type, init, d_state):
    """Also in the eigenbasis that the scan runs in."""
    matrix = build(d_state, type=type, init=init)
    width = matrix.numbers * d_state
    with torch.no_grad():
        scanned = matrix.scan_matrices(*torch.randn(2, 1, 1, 3, width))
    assert matrix.eigenvalues().real.amax(-1).max() < -0.4
    assert scanned.A.real.max() < -0.4


@pytest.mark.parametrize('init', PAIRS)
def test_pairs(init):
    """A complex matrix stores one of each pair, a full one holds both."""
    values = S4D_PAIRS[init](4)
    matrix = build(4, type='complex', init=init)
    assert matrix.multiplicity == matrix.numbers == 2
    assert_same_values(matrix.eigenvalues(), values, 1e-5)
    both = torch.cat([values, values.conj()])
    for block_size, rank in ((2, 1), (4, 0), (8, 2)):
        full = build(type='full', init=init, block_size=block_size, rank=rank)
        # a double eigenvalue, as S4D-Lin's real one, is found to a half
        assert_same_values(full.eigenvalues(), both, 1e-3)
        assert torch.equal(full.dense().mT + full.dense(), -torch.eye(8)[None])


@pytest.mark.parametrize(
    ('block_size', 'rank'), [(2, 1), (4, 1), (8, 1), (2, 3), (8, 0)]
)
def test_hippo_is_exact(block_size, rank):
    """In float32, and after a rotation."""
    matrix = build(
        type='full', init='hippo', block_size=block_size, rank=rank, groups=2
    )
    Q, A = legs_normal_form(8).rotation, hippo_legs(8)[0]
    assert matrix.dense().shape == (2, 8, 8)
    for dense in matrix.dense().double():
        assert (Q @ dense @ Q.mT - A).abs().max() <= 1e-5


@pytest.mark.parametrize('optimize', [False, True])
@pytest.mark.parametrize(('block_size', 'rank'), [(2, 1), (4, 2), (8, 0)])
def test_ptd_of_a_full_matrix(block_size, rank, optimize):
    """A small E within the blocks, and a basis that is used as it is."""
    matrix = build(
        type='full',
        init='ptd',
        block_size=block_size,
        rank=rank,
        ptd_norm=0.3,
        ptd_optimize=optimize,
        ptd_steps=20,
    )
    E = matrix.dense()[0].double() - legs_normal_form(8).dense
    limit = 0.49 if optimize else 0.3
    assert torch.linalg.matrix_norm(E, 2) <= limit + 1e-5
    inside = torch.block_diag(
        *[torch.ones(block_size, block_size)] * (8 // block_size)
    ).bool()
    assert E[inside].abs().min() > 1e-5
    assert not inside.all() or rank == 0
    assert (~inside).sum() == 0 or E[~inside].abs().max() <= 1e-5
    assert matrix.condition() < 100
    assert matrix.eigenbasis().kind(1e3, True) == COMPLEX64


def test_ptd_of_a_complex_matrix():
    """All eigenvalues of HiPPO plus E, on every channel."""
    basis = perturb_then_diagonalize(
        hippo_legs(8)[0], Perturbation(norm=0.2, seed=3)
    )
    options = dict(type='complex', init='ptd', ptd_norm=0.2, ptd_seed=3)
    real, free, bare = (
        build(**options, **more)
        for more in ({}, dict(real_part='free'), dict(with_basis=False))
    )
    for matrix in (real, free, bare):
        assert_same_values(matrix.eigenvalues(), basis.eigenvalues, 1e-5)
    assert real.multiplicity == real.numbers == 1
    assert bare.multiplicity == bare.numbers == 2
    assert real.condition().item() == pytest.approx(basis.condition, rel=1e-3)
    assert bare.condition() == 1
    wanted = hippo_legs(8)[0] + basis.perturbation
    for dense in real.dense().to(torch.complex128):
        assert (dense - wanted).abs().max() <= 1e-3
    assert bare.dense().diagonal(dim1=1, dim2=2).equal(bare.eigenvalues())


def test_rank_beyond_the_first_moves():
    """The first column is HiPPO's, the others start as usual."""
    matrix = build(type='full', init='hippo', rank=3)
    p = legs_normal_form(8).rank_one.float()
    assert torch.equal(matrix.U[0, :, 0], -p)
    assert torch.equal(matrix.V[0, :, 0], p)
    assert not matrix.U[0, :, 1:].any()
    assert matrix.V[0, :, 1:].abs().min() > 0


def test_found_once_for_all_layers(monkeypatch):
    """An optimized E takes a second; a model has dozens of matrices."""
    calls = []

    def counted(*args):
        calls.append(args)
        return perturb_then_diagonalize(*args)

    monkeypatch.setattr(initialization, 'perturb_then_diagonalize', counted)
    # options that no other test has, as the results are kept
    options = dict(init='ptd', ptd_optimize=True, ptd_steps=7)
    for _ in range(3):
        build(6, type='complex', **options)
        build(6, type='full', **options)
    assert len(calls) == 2


# ------------------------------------------------------------------ layers


def states_and_steps(ssm, x, monkeypatch):
    """What a layer gives to its state matrix."""
    seen = {}
    original = ssm.state_matrix.scan_matrices

    def look(B, C):
        seen.update(B=B, C=C)
        return original(B, C)

    monkeypatch.setattr(ssm.state_matrix, 'scan_matrices', look)
    ssm.observers.append(lambda delta: seen.update(delta=delta))
    return ssm(x[None])[0], {k: v[0] for k, v in seen.items()}


@pytest.mark.usefixtures('in_double')
@pytest.mark.parametrize('hippo_bias', [False, True])
@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('reverse', [False, True])
def test_starts_as_the_real_selective_ssm(
    reverse, b_disc, hippo_bias, monkeypatch
):
    """Of A = HiPPO + E, by the matrix exponential, token by token."""
    torch.manual_seed(0)
    ssm = SelectiveSSM(
        4,
        8,
        dt_rank=2,
        order=ScanOrder((reverse,)),
        b_disc=b_disc,
        state_matrix=dict(type='complex', init='ptd', hippo_bias=hippo_bias),
    )
    x = torch.randn(2, 9, 4)
    y, seen = states_and_steps(ssm, x, monkeypatch)
    A, B = hippo_legs(8)
    A = A + perturb_then_diagonalize(A).perturbation
    wanted, _ = matrix_exponential_scan(
        x,
        seen['delta'],
        A[None],
        seen['B'] + (B / 8 if hippo_bias else 0),
        seen['C'],
        ssm.D,
        b_disc,
        reverse,
    )
    assert (y - wanted).abs().max() <= 1e-11 * wanted.abs().max()


@pytest.mark.usefixtures('in_double')
def test_full_and_complex_ptd_agree():
    """The same A, once trainable as a matrix and once by eigenvalues."""
    full = build(type='full', init='ptd', block_size=8, rank=0, d_inner=1)
    diagonal = build(type='complex', init='ptd', d_inner=1)
    with torch.no_grad():
        E = perturb_then_diagonalize(hippo_legs(8)[0]).perturbation
        full.double().blocks[0, 0] = hippo_legs(8)[0] + E
    B, C = torch.randn(2, 1, 1, 5, 8)
    a, b = (m.scan_matrices(B, C) for m in (full, diagonal))
    # the response sum C B / (s - lambda) has neither order nor scale
    s = 0.3 + 2j
    responses = [
        ((m.C[..., 0, :] * m.B[..., 0, :]) / (s - m.A)).sum(-1).real
        for m in (a, b)
    ]
    assert torch.allclose(*responses, rtol=1e-9)


@pytest.mark.parametrize(
    'options',
    [
        dict(type='complex', init='ptd'),
        dict(type='complex', init='ptd', real_part='free', hippo_bias=True),
        dict(type='complex', init='ptd', with_basis=False, hippo_bias=True),
        dict(type='complex', init='s4d_legs', hippo_bias=True),
        dict(type='full', init='ptd'),
        dict(type='full', init='hippo'),
    ],
    ids=str,
)
def test_trains(options):
    """Gradients reach every parameter; the buffers stay; bfloat16 too."""
    torch.manual_seed(0)
    mixer = MambaMixer(8, d_state=8, state_matrix=options)
    x = torch.randn(2, 7, 8)
    buffers = {k: v.clone() for k, v in mixer.named_buffers()}
    optimizer = torch.optim.SGD(mixer.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        mixer(x).square().mean().backward()
        optimizer.step()
    for name, parameter in mixer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    assert all(torch.equal(v, buffers[k]) for k, v in mixer.named_buffers())
    exact = mixer(x)
    with torch.autocast('cpu', torch.bfloat16):
        narrow = mixer(x)
    assert (narrow - exact).abs().max() <= 0.05 * exact.abs().max()
    matrix = mixer.ssm.state_matrix
    assert matrix.eigenvalues().dtype == torch.complex64


@pytest.mark.usefixtures('in_double')
def test_training_keeps_the_matrix_real():
    """Conjugate eigenvalues get conjugate gradients."""
    torch.manual_seed(0)
    ssm = SelectiveSSM(
        4, 8, dt_rank=2, state_matrix=dict(type='complex', init='ptd')
    )
    optimizer = torch.optim.SGD(ssm.parameters(), lr=1e-3)
    start = ssm.state_matrix.eigenvalues().detach()
    for _ in range(4):
        optimizer.zero_grad()
        ssm(10 * torch.randn(1, 2, 9, 4)).sin().sum().backward()
        optimizer.step()
    values = ssm.state_matrix.eigenvalues()
    assert (values - start).abs().max() > 1e-4
    assert torch.allclose(values, values.flip(1).conj(), atol=1e-10)
    assert ssm.state_matrix.dense().imag.abs().max() <= 1e-9


def test_checkpoint_holds_the_basis():
    """Another seed gives another basis, until a checkpoint is loaded."""
    a, b = (
        SelectiveSSM(
            4,
            8,
            dt_rank=2,
            state_matrix=dict(type='complex', init='ptd', ptd_seed=seed),
        )
        for seed in (0, 1)
    )
    x = torch.randn(1, 2, 5, 4)
    assert not torch.allclose(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))


def test_casts_keep_the_imaginary_parts():
    matrix = build(type='complex', init='ptd')
    wide = build(type='complex', init='ptd').to(torch.float64)
    B, C = torch.randn(2, 1, 1, 3, 8)
    for a, b in zip(
        matrix.scan_matrices(B, C), wide.scan_matrices(B, C), strict=True
    ):
        assert b.dtype == torch.complex128
        assert torch.allclose(a.to(b.dtype), b, rtol=1e-5, atol=1e-4)


def test_stabilizers_act_on_eigenvalues_only():
    matrix = build(16, type='complex', init='ptd')
    buffers = {k: v.clone() for k, v in matrix.named_buffers()}
    radius = matrix.eigenvalues().abs().amax(-1)
    assert radius.min() > 30
    matrix.apply_(SpectralNormalization(rho_max=4.0))
    assert torch.allclose(
        matrix.eigenvalues().abs().amax(-1), torch.tensor(4.0)
    )
    matrix.apply_(EigenvalueClamping(eps=1.0))
    assert matrix.eigenvalues().real.amax(-1).max() <= -1 + 1e-5
    assert all(torch.equal(v, buffers[k]) for k, v in matrix.named_buffers())


@pytest.mark.parametrize('with_basis', [False, True])
def test_hippo_bias_of_ptd(with_basis):
    """A unit vector: HiPPO's B over N, in the coordinates of B_t."""
    matrix = build(
        type='complex', init='ptd', hippo_bias=True, with_basis=with_basis
    )
    bias = matrix.input_bias.value
    wanted = hippo_legs(8)[1] / 8
    if not with_basis:
        basis = perturb_then_diagonalize(hippo_legs(8)[0])
        bias, wanted = as_complex(bias), wanted.to(torch.complex128)
        bias = basis.vectors.to(bias.dtype) @ bias
    assert torch.allclose(bias, wanted.to(bias.dtype), atol=1e-5)


def test_hippo_bias_of_s4d_legs():
    matrix = build(type='complex', init='s4d_legs', hippo_bias=True)
    bias = as_complex(matrix.input_bias.value)
    wanted = s4d_legs_input(8) / 16
    assert torch.allclose(bias, wanted.to(bias.dtype))


@pytest.mark.parametrize(('type', 'init'), FITTING)
def test_built_on_another_device(type, init):
    with torch.device('meta'):
        matrix = build(type=type, init=init, d_inner=2)
    tensors = [*matrix.parameters(), *matrix.buffers()]
    assert {x.device.type for x in tensors} == {'meta'}


# --------------------------------------------------------------- bad input


@pytest.mark.parametrize(('type', 'init'), OTHERS)
def test_what_does_not_fit_is_refused(type, init):
    message = f"init='{init}' needs a state matrix of type .* got type '{type}"
    with pytest.raises(ValueError, match=message):
        build(type=type, init=init)


def test_what_fits():
    """Nothing that was offered disappears."""
    pairs = {'s4d_lin', 's4d_inv', 's4d_legs'}
    wanted = {
        'neg_exp': {'s4d_real'},
        'signed': {'s4d_real'},
        'complex': pairs | {'ptd'},
        'full': pairs | {'s4d_real', 'hippo', 'ptd'},
    }
    for type, inits in wanted.items():
        assert {i for t, i in FITTING if t == type} == inits
        assert {i for t, i in OTHERS if t == type} == INITS.keys() - inits


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(init='hippo_legs'), "init must be one of .*'ptd'.* got 'hippo_"),
        (dict(type='full', ptd_norm=0.3), "ptd_norm needs init='ptd', got"),
        (
            dict(type='complex', init='s4d_inv', ptd_optimize=True),
            "ptd_optimize needs init='ptd', got init='s4d_inv'",
        ),
        (
            dict(type='complex', init='ptd', ptd_norm=0.6),
            r'norm must be at most 0\.49.* got 0\.6',
        ),
        (
            dict(type='full', init='hippo', block_size=1),
            "init='hippo' needs an even block_size, got 1",
        ),
        (
            dict(type='full', init='ptd', rank=0),
            "init='ptd' needs rank >= 1 .* got rank 0, block_size 2",
        ),
        (
            dict(type='full', init='ptd', kappa_max=10.0),
            r'condition number .*, which kappa_max = 10 refuses',
        ),
        (
            dict(type='complex', init='s4d_legs', with_basis=True),
            "with_basis needs init='ptd', got 's4d_legs'",
        ),
        (
            dict(type='complex', init='s4d_inv', hippo_bias=True),
            "hippo_bias needs init='s4d_legs' or 'ptd', got 's4d_inv'",
        ),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ('options', 'name'),
    [
        (dict(type='complex', init='ptd', ptd_size=0.4), 'size'),
        (dict(type='signed', groups=2), 'groups'),
    ],
    ids=str,
)
def test_unknown_options(options, name):
    with pytest.raises(TypeError, match=f"argument '{name}'"):
        build(**options)
