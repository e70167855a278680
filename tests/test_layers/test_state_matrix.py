"""The four state matrices: values, constraints, and the scan they give."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mmstabvim.layers.scan_order import BIDIRECTIONAL, ScanOrder
from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.layers.state_matrix import (
    EigenvalueClamping,
    NegExp,
    ScanMatrices,
    SpectralNormalization,
    build_state_matrix,
    decompose_all,
    state_matrices,
)
from mmstabvim.ops import selective_scan
from mmstabvim.stability.state import eigenbasis
from mmstabvim.stability.state.eigenbasis import (
    EXPONENTIAL,
    matrix_exponential_scan,
)

KINDS = {
    'neg_exp': dict(type='neg_exp'),
    'signed': dict(type='signed'),
    'complex': dict(type='complex'),
    'complex free': dict(type='complex', real_part='free'),
    'full': dict(type='full', groups=2),
    'full, larger blocks': dict(type='full', groups=4, block_size=4, rank=2),
    'full, no low rank': dict(type='full', rank=0),
}
kinds = pytest.mark.parametrize('kind', KINDS)


def detmat(rows, columns, tag):
    """``sin(k^2 + tag)`` with k from 1, row by row, float64."""
    k = torch.arange(1.0, rows * columns + 1, dtype=torch.float64)
    return torch.sin(k.square() + tag).reshape(rows, columns)


def build(kind, d_inner=8, d_state=8, seed=0):
    torch.manual_seed(seed)
    return build_state_matrix(d_inner, d_state, **KINDS[kind])


def make_ssm(*sizes, reverse=False, **options):
    """A layer that walks in one direction."""
    return SelectiveSSM(*sizes, order=ScanOrder((reverse,)), **options)


def run(ssm, x):
    """Output of a layer with one direction, (batch, length, d_inner)."""
    return ssm(x[None])[0]


def scan_matrices(matrix, B, C):
    """Of the only direction."""
    system = matrix.scan_matrices(B[None], C[None])
    return system and ScanMatrices(*(x[0] for x in system))


@torch.no_grad()
def disturb(matrix, size=2.0, seed=0):
    """Random parameters: some unstable where they can be."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in matrix.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(size * noise)
    return matrix


def full_of(dense, block_size, U=None, V=None, d_inner=1, **options):
    """A float64 full matrix with one group and these blocks."""
    size = len(dense)
    rank = 0 if U is None else U.shape[1]
    matrix = build_state_matrix(
        d_inner,
        size,
        'full',
        block_size=block_size,
        rank=rank,
        **options,
    ).double()
    blocks = dense.unflatten(0, (-1, block_size)).unflatten(
        2, (-1, block_size)
    )
    index = torch.arange(size // block_size)
    with torch.no_grad():
        matrix.blocks.copy_(blocks.transpose(1, 2)[index, index][None])
        if rank:
            matrix.U.copy_(U[None])
            matrix.V.copy_(V[None])
    return matrix


def a4():
    """The 4 x 4 example: two blocks and a rank-one term."""
    blocks = torch.block_diag(
        torch.tensor([[-0.5, -2.0], [2.0, -0.5]]),
        torch.tensor([[-1.0, 0.5], [0.0, -1.5]]),
    ).double()
    return full_of(blocks, 2, 0.5 * detmat(4, 1, 1), detmat(4, 1, 2))


# ------------------------------------------------------------------ values


@kinds
def test_starts_stable(kind):
    matrix = build(kind)
    values = matrix.eigenvalues()
    assert values.shape[-1] == 8
    assert values.real.max() < 0
    assert torch.equal(
        matrix.eigenvalues().real.amax(-1), values.real.amax(-1)
    )
    assert torch.equal(
        matrix.eigenvalues().abs().amax(-1), values.abs().amax(-1)
    )


def test_s4d_real():
    """-1, ..., -N on every channel, exactly (a stored log rounds)."""
    modes = torch.arange(1.0, 9).expand(8, 8)
    assert torch.equal(build('signed').eigenvalues(), -modes)
    assert torch.allclose(build('neg_exp').eigenvalues(), -modes, rtol=1e-6)
    full = build('full').eigenvalues().real.sort(descending=True).values
    assert torch.allclose(full, -modes[:2], rtol=1e-6)


@kinds
def test_dense_has_the_eigenvalues(kind):
    matrix = disturb(build(kind), 0.3)
    values = torch.linalg.eigvals(matrix.dense().to(torch.complex128))
    for found, own in zip(values, matrix.eigenvalues(), strict=True):
        gap = (found[:, None] - own.to(found.dtype)).abs().amin(-1)
        assert gap.max() <= 1e-4  # of about 8


def test_blocks_and_low_rank_are_where_they_should_be():
    matrix = a4()
    dense = matrix.dense()[0]
    low_rank = 0.5 * detmat(4, 1, 1) @ detmat(4, 1, 2).T
    blocks = (dense - low_rank).detach()
    assert torch.allclose(blocks[:2, :2], matrix.blocks[0, 0])
    assert torch.allclose(blocks[2:, 2:], matrix.blocks[0, 1])
    assert blocks[:2, 2:].abs().max() <= 1e-15
    assert blocks[2:, :2].abs().max() <= 1e-15


def test_eigenvalues_of_the_example():
    values = a4().eigenvalues()[0]
    wanted = torch.tensor(
        [
            -0.3948565035 + 1.9952165840j,
            -0.3948565035 - 1.9952165840j,
            -0.3299883721,
            -1.5491629196,
        ],
        dtype=torch.complex128,
    )
    gap = (values[:, None] - wanted).abs().amin(-1)
    assert gap.max() <= 1e-9
    assert a4().eigenvalues().abs().amax(-1).item() == pytest.approx(
        2.0339127010
    )
    assert a4().condition().item() == pytest.approx(1.6767636933)


# -------------------------------------------------------- the whole matrix


def scan_example(matrix, b_disc):
    """The example's scan through the state matrix, with its leaves."""
    length = 6
    t = torch.arange(length, dtype=torch.float64)
    B, C = detmat(length, 4, 3)[None], detmat(length, 4, 4)[None]
    A, B, C = scan_matrices(matrix, B, C)
    return selective_scan(
        t.cos()[None, :, None],
        (0.1 + 0.05 * t)[None, :, None],
        A,
        B,
        C,
        b_disc=b_disc,
        channels_last=True,
    )[0, :, 0]


@pytest.mark.parametrize(
    ('b_disc', 'wanted'),
    [
        (
            'euler',
            (
                0.1287090827,
                0.1925518532,
                -0.0158168305,
                -0.3455081645,
                -0.3000006325,
                0.3847096511,
            ),
        ),
        (
            'zoh',
            (
                0.1225872768,
                0.1866937536,
                -0.0075835815,
                -0.2467186565,
                -0.3856397418,
                0.3262474699,
            ),
        ),
    ],
)
def test_scan_of_the_example(b_disc, wanted):
    y = scan_example(a4(), b_disc)
    assert torch.allclose(y, torch.tensor(wanted).double(), atol=1e-9)


def test_gradient_of_the_example():
    """With respect to the dense matrix, through the eigenbasis."""
    matrix = a4()
    loss = scan_example(matrix, 'euler').sin().sum()
    assert loss.item() == pytest.approx(0.0449964079, abs=1e-9)
    loss.backward()
    first = (0.2156478527, 0.0409717972, 0.0898259047, 0.2206891737)
    last = (-0.2549713748, -0.0027379420, -0.0501005096, -0.2230100202)
    blocks = matrix.blocks.grad[0]
    assert blocks[0, 0].tolist() == pytest.approx(first[:2], abs=1e-9)
    assert blocks[1, 1].tolist() == pytest.approx(last[2:], abs=1e-9)
    # d/dU = (d/dA) V, so its first and last rows hold the other entries too
    V = detmat(4, 1, 2)[:, 0]
    dU = matrix.U.grad[0, :, 0]
    assert dU[0].item() == pytest.approx(
        float(torch.tensor(first, dtype=V.dtype) @ V), abs=1e-9
    )
    assert dU[3].item() == pytest.approx(
        float(torch.tensor(last, dtype=V.dtype) @ V), abs=1e-9
    )


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
@pytest.mark.parametrize('reverse', [False, True])
def test_eigenbasis_scan_is_the_matrix_exponential_scan(reverse, b_disc):
    """Token by token, values and gradients, for groups of channels."""
    torch.manual_seed(0)
    matrix = build_state_matrix(6, 4, 'full', groups=2, block_size=2, rank=1)
    matrix = disturb(matrix.double(), 0.5)
    shape = dict(dtype=torch.float64)
    u, B, C = (torch.randn(2, 7, n, **shape) for n in (6, 4, 4))
    delta = torch.rand(2, 7, 6, **shape)
    results = []
    for exact in (True, False):
        matrix.zero_grad()
        leaves = [x.clone().requires_grad_() for x in (u, delta, B, C)]
        if exact:
            y, _ = matrix_exponential_scan(
                leaves[0],
                leaves[1],
                matrix.dense(),
                *leaves[2:],
                reverse=reverse,
                b_disc=b_disc,
            )
        else:
            A, B_, C_ = scan_matrices(matrix, *leaves[2:])
            y = selective_scan(
                *leaves[:2],
                A,
                B_,
                C_,
                reverse=reverse,
                b_disc=b_disc,
                channels_last=True,
            )
        y.sin().sum().backward()
        grads = [x.grad for x in (*leaves, *matrix.parameters())]
        results.append([y.detach(), *grads])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-10 * a.abs().max()


def test_off_diagonal_entries_count():
    """Nothing of the matrix is dropped."""
    torch.manual_seed(0)
    ssm = make_ssm(8, 4, state_matrix=dict(type='full', groups=2))
    ssm.dt_bias.data.fill_(1.0)  # steps large enough to see it
    x = 3 * torch.randn(1, 9, 8)
    before = run(ssm, x)
    with torch.no_grad():
        ssm.state_matrix.blocks[0, 0, 0, 1] += 1.0
    after = run(ssm, x)
    assert (after - before)[..., :4].abs().max() > 1e-4
    assert torch.equal(after[..., 4:], before[..., 4:])  # the other group


def test_signed_negative_is_neg_exp():
    signed, neg_exp = build('signed'), build('neg_exp')
    B, C = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    a, b = (scan_matrices(m, B, C).A for m in (signed, neg_exp))
    assert torch.allclose(a, b, rtol=1e-6)


def ssm_like(ssm, **state_matrix):
    """The same layer with another state matrix."""
    other = make_ssm(8, 4, dt_rank=2, state_matrix=state_matrix)
    other.load_state_dict(ssm.state_dict(), strict=False)
    return other


def test_full_with_single_entries_is_signed():
    """Blocks of one number, no low rank, a group per channel."""
    torch.manual_seed(0)
    signed = make_ssm(8, 4, dt_rank=2, state_matrix=dict(type='signed'))
    full = ssm_like(signed, type='full', groups=8, block_size=1, rank=0)
    disturb(signed.state_matrix, 0.2)
    with torch.no_grad():
        full.state_matrix.blocks.copy_(signed.state_matrix.A[:, :, None, None])
    x = torch.randn(2, 9, 8)
    assert torch.allclose(run(full, x), run(signed, x), atol=1e-5)


def test_normal_blocks_are_complex_pairs():
    """[[a, -w], [w, a]] is a + i w, driven by b1 + i b2, read by c1 - i c2."""
    real = torch.tensor([[-0.3, -2.0], [2.0, -0.3]], dtype=torch.float64)
    matrix = full_of(real, 2)
    delta = torch.tensor([0.5, 1.0, 0.25]).double()[None, :, None]
    u = torch.tensor([1.0, -2.0, 3.0]).double()[None, :, None]
    B = torch.tensor([1.0, 0.5]).double().expand(1, 3, 2)
    C = torch.tensor([2.0, -1.0]).double().expand(1, 3, 2)
    y = selective_scan(
        u, delta, *scan_matrices(matrix, B, C), channels_last=True
    )
    wanted = (0.75, -3.9048409711, -0.3626653857)
    assert y.flatten().tolist() == pytest.approx(wanted, abs=1e-9)


# ------------------------------------------------- ill-conditioned matrices


def defective(kappa_max=1e3):
    """A Jordan block: no eigenbasis at all."""
    jordan = torch.tensor([[-1.0, 1.0], [0.0, -1.0]]).double()
    return full_of(jordan, 2, kappa_max=kappa_max)


@pytest.mark.parametrize('backward', [False, True])
def test_nothing_is_perturbed(backward):
    """The scan of nearly defective matrices is that of the exponential."""
    torch.manual_seed(0)
    kinds = []
    for coupling in (1e-2, 1e-7, 1e-12, 0.0):
        dense = torch.tensor([[-1.0, 5.0], [coupling, -1.0]]).double()
        ssm = make_ssm(4, 2, dt_rank=2, state_matrix=dict(type='full', rank=0))
        ssm.state_matrix.blocks.data.copy_(dense)
        with torch.set_grad_enabled(backward):
            system = scan_matrices(
                ssm.state_matrix, *2 * [torch.ones(1, 3, 2)]
            )
        kinds.append(system and system.A.dtype)
        x = torch.randn(2, 9, 4)
        ssm.requires_grad_(backward)
        y = run(ssm, x)
        exact = copy.deepcopy(ssm).double()
        exact.state_matrix.parametrization._kind = lambda *_: EXPONENTIAL
        wanted = run(exact, x.double())
        assert (y - wanted).abs().max() <= 5e-6 * wanted.abs().max()
        if backward:
            y.sin().sum().backward()
            wanted.sin().sum().backward()
            for p, q in zip(ssm.parameters(), exact.parameters(), strict=True):
                size = q.grad.abs().max()
                assert (p.grad - q.grad).abs().max() <= 5e-3 * size
    wide = None if backward else torch.complex128
    assert kinds == [torch.complex64, torch.complex128, wide, None]


def test_defective_matrices_can_be_refused():
    matrix = defective()
    matrix.parametrization.on_defective = 'raise'
    with pytest.raises(RuntimeError, match="on_defective is 'raise'"):
        scan_matrices(matrix, *2 * [torch.ones(1, 3, 2)])


@pytest.mark.parametrize('reverse', [False, True])
def test_without_an_eigenbasis_the_exponential_is_used(reverse):
    """Same layer, same numbers, and gradients."""
    options = dict(type='full', groups=2, block_size=2, rank=1)
    torch.manual_seed(0)
    a = make_ssm(8, 4, dt_rank=2, reverse=reverse, state_matrix=options)
    disturb(a.state_matrix, 0.3)
    b = copy.deepcopy(a)
    b.state_matrix.parametrization._kind = lambda *_: EXPONENTIAL
    x = torch.randn(2, 9, 8)
    ys = [run(ssm, x) for ssm in (a, b)]
    assert scan_matrices(b.state_matrix, *2 * [torch.ones(1, 3, 4)]) is None
    assert torch.allclose(*ys, atol=2e-5)
    for y in ys:
        y.sin().sum().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max()


def test_equal_eigenvalues_give_finite_gradients():
    """An eigenbasis may exist, but where two eigenvalues meet it can turn."""
    ssm = make_ssm(4, 4, state_matrix=dict(type='full', rank=0))
    ssm.state_matrix.blocks.data.copy_(-torch.eye(2).expand(1, 2, 2, 2))
    B = C = torch.ones(1, 3, 4)
    with torch.no_grad():
        assert scan_matrices(ssm.state_matrix, B, C).A.dtype == torch.complex64
    A = scan_matrices(ssm.state_matrix, B, C).A
    assert A.dtype == torch.complex128
    run(ssm, torch.randn(1, 5, 4)).sin().sum().backward()
    assert torch.isfinite(ssm.state_matrix.blocks.grad).all()
    assert ssm.state_matrix.blocks.grad.abs().max() > 0


# ------------------------------------------------------------- the cache


@pytest.fixture
def decompositions(monkeypatch):
    """Shapes of the batches that are decomposed."""
    from mmstabvim.layers.state_matrix import full

    shapes = []

    def counted(A, *args):
        shapes.append(tuple(A.shape))
        return eigenbasis.decompose(A, *args)

    monkeypatch.setattr(full, 'decompose', counted)
    return shapes


def test_one_decomposition_for_all(decompositions):
    matrices = [build('full', seed=seed) for seed in range(3)]
    decompose_all(dict(enumerate(matrices)))
    assert decompositions == [(6, 8, 8)]
    B, C = torch.randn(2, 1, 5, 8)
    for matrix in matrices:
        for _ in range(2):  # a second forward pass, a second gradient
            sum(x.abs().sum() for x in scan_matrices(matrix, B, C)).backward()
    assert decompositions == [(6, 8, 8)]
    decompose_all(
        dict(enumerate(matrices))
    )  # at the start of another forward pass
    assert decompositions == [(6, 8, 8)]
    with torch.no_grad():
        matrices[1].blocks.mul_(2)
    decompose_all(dict(enumerate(matrices)))
    assert decompositions == [(6, 8, 8)] * 2


def test_decomposed_anew_when_a_parameter_changes(decompositions):
    """Also behind autograd's back, as weight averaging does it."""
    matrix = build('full')
    B, C = torch.randn(2, 1, 5, 8)
    first = scan_matrices(matrix, B, C).A
    matrix.blocks.data.mul_(2)
    second = scan_matrices(matrix, B, C).A
    assert len(decompositions) == 2
    # twice the blocks, and the low rank is zero at the start
    assert torch.allclose(second, 2 * first)


def other_parameters(matrix):
    """The same matrices, twice as large."""
    other = copy.deepcopy(matrix)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.mul_(2 if name == 'blocks' else 2**0.5)
    return other


def change_in_place(matrix, other):
    with torch.no_grad():
        for mine, new in zip(
            matrix.parameters(), other.parameters(), strict=True
        ):
            mine.copy_(new)


def load(matrix, other):
    matrix.load_state_dict(other.state_dict())


def load_by_assignment(matrix, other):
    matrix.load_state_dict(other.state_dict(), assign=True)


def swap_data(matrix, other):
    """As EMAHook exchanges a model's weights with the averages."""
    for mine, new in zip(matrix.parameters(), other.parameters(), strict=True):
        mine.data, new.data = new.data, mine.data


def replace_parameters(matrix, other):
    for name, parameter in list(other.named_parameters()):
        setattr(matrix, name, parameter)


@pytest.mark.parametrize('without_grad', [False, True])
@pytest.mark.parametrize(
    'change',
    [
        change_in_place,
        load,
        load_by_assignment,
        swap_data,
        replace_parameters,
    ],
)
def test_no_change_is_missed(change, without_grad, decompositions):
    """And none is decomposed twice."""
    matrix = disturb(build('full'), 0.2)
    other = other_parameters(matrix)
    B, C = torch.randn(2, 1, 5, 8)
    with torch.set_grad_enabled(not without_grad):
        first = scan_matrices(matrix, B, C).A
        again = scan_matrices(matrix, B, C).A
        change(matrix, other)
        second = scan_matrices(matrix, B, C).A
    assert torch.equal(again, first)
    assert len(decompositions) == 2
    gap = (second[..., None] - 2 * first[..., None, :]).abs().amin(-1)
    assert gap.max() <= 1e-4


def test_optimizer_steps_change_the_decomposition(decompositions):
    """One for each step, however often the model runs in it."""
    matrix = build('full')
    optimizer = torch.optim.SGD(matrix.parameters(), lr=0.1)
    B, C = torch.randn(2, 1, 5, 8)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            A = scan_matrices(matrix, B, C).A
            A.real.sum().backward()
        seen.append(A.detach().real.sum().item())
        optimizer.step()
    assert len(decompositions) == 3
    assert seen[0] > seen[1] > seen[2]


def test_recomputed_layers_use_the_same_decomposition(decompositions):
    """Activation checkpointing: same bits, same gradients."""
    torch.manual_seed(0)
    ssm = make_ssm(8, 4, state_matrix=dict(type='full', groups=2))
    x = torch.randn(2, 9, 8)
    results = []
    for again in (False, True):
        ssm.zero_grad()
        y = (
            checkpoint(run, ssm, x, use_reentrant=False)
            if again
            else run(ssm, x)
        )
        y.sin().sum().backward()
        results.append([y.detach(), *(p.grad for p in ssm.parameters())])
    assert all(map(torch.equal, *results))
    assert len(decompositions) == 1


def test_compiled_layers_notice_a_change():
    torch.manual_seed(0)
    ssm = make_ssm(8, 4, state_matrix=dict(type='full', groups=2))
    compiled = torch.compile(ssm, backend='aot_eager')
    x = torch.randn(2, 9, 8)
    for _ in range(2):
        y = run(compiled, x)
        torch.testing.assert_close(y, run(ssm, x))
        y.sin().sum().backward()
        grads = [p.grad.clone() for p in ssm.parameters()]
        ssm.zero_grad()
        run(ssm, x).sin().sum().backward()
        for compiled_grad, p in zip(grads, ssm.parameters(), strict=True):
            torch.testing.assert_close(compiled_grad, p.grad)
        ssm.zero_grad()
        with torch.no_grad():
            ssm.state_matrix.blocks.mul_(2)


def test_shared_computation_gives_the_same_bits():
    """Alone or together with others."""
    a, b = build('full', seed=1), build('full', seed=1)
    disturb(a, 0.2), disturb(b, 0.2)
    decompose_all({'other': build('full', seed=2), 'a': a})
    B, C = torch.randn(2, 1, 5, 8)
    for x, y in zip(
        scan_matrices(a, B, C), scan_matrices(b, B, C), strict=True
    ):
        assert torch.equal(x, y)


# --------------------------------------------------- spectral normalization


@pytest.mark.parametrize('kind', ['neg_exp', 'signed'])
def test_literal_normalization_of_s4d_real(kind):
    """-(1..16) becomes -(1..16) / 16."""
    matrix = build(kind, d_state=16)
    matrix.apply_(SpectralNormalization())
    wanted = -torch.arange(1.0, 17) / 16
    assert torch.allclose(matrix.eigenvalues(), wanted.expand(8, 16))


def test_rows_are_normalized_one_by_one():
    rows = torch.tensor([[1.0, 2, 4], [0.25, 0.5, 0.75]])
    for rho_max, first in ((1.0, [0.25, 0.5, 1]), (2.0, [0.5, 1, 2])):
        matrix = build_state_matrix(2, 3, 'signed')
        matrix.A.data.copy_(rows)
        matrix.apply_(SpectralNormalization(rho_max=rho_max))
        assert matrix.A[0].tolist() == first
        assert torch.equal(matrix.A[1], rows[1])


def test_layer_granularity_scales_all_alike():
    rows = torch.tensor([[1.0, 2, 4], [0.25, 0.5, 0.75]])
    matrix = build_state_matrix(2, 3, 'signed')
    matrix.A.data.copy_(rows)
    matrix.apply_(SpectralNormalization(granularity='layer'))
    assert torch.equal(matrix.A, rows / 4)


def test_block_granularity_says_nothing_about_the_sum():
    """[[0, 3], [0, 0]] plus a rank one: radius 0 each, 3 together."""
    matrix = full_of(
        torch.tensor([[0.0, 3], [0, 0]]).double(),
        2,
        torch.tensor([[0.0], [1]]).double(),
        torch.tensor([[3.0], [0]]).double(),
    )
    before = [p.clone() for p in matrix.parameters()]
    matrix.apply_(SpectralNormalization(granularity='block'))
    assert all(map(torch.equal, matrix.parameters(), before))
    assert matrix.eigenvalues().abs().amax(-1).item() == pytest.approx(3)
    matrix.apply_(SpectralNormalization())
    assert matrix.eigenvalues().abs().amax(-1).item() == pytest.approx(1)


def test_block_granularity_bounds_each_block():
    matrix = disturb(build('full, larger blocks'), 3.0)
    matrix.apply_(SpectralNormalization(granularity='block', rho_max=0.5))
    blocks, low_rank = (
        torch.linalg.eigvals(x.detach()).abs().max().item()
        for x in (matrix.blocks, matrix.U @ matrix.V.mT)
    )
    assert blocks == pytest.approx(0.5, rel=1e-5)
    assert low_rank == pytest.approx(0.5, rel=1e-5)


rules = pytest.mark.parametrize(
    'rule',
    [
        SpectralNormalization(),
        SpectralNormalization(rho_max=3.0, granularity='layer'),
        SpectralNormalization(radius='gelfand'),
        SpectralNormalization(domain='discrete'),
        SpectralNormalization(domain='discrete', rho_max=0.9),
        SpectralNormalization(
            domain='discrete', rho_max=0.9, granularity='layer'
        ),
        EigenvalueClamping(),
        EigenvalueClamping(lambda_max=4.0),
        EigenvalueClamping(domain='discrete', margin=0.02),
        EigenvalueClamping(method='eig'),
        EigenvalueClamping(method='schur'),
    ],
    ids=str,
)


def assert_obeys(matrix, rule):
    values = matrix.eigenvalues()
    if isinstance(rule, EigenvalueClamping):
        assert values.real.max() <= -rule.floor + 2e-4  # float32, and kappa
        structured = hasattr(matrix, 'blocks')
        if rule.lambda_max is not None and not structured:
            assert values.real.min() >= -rule.lambda_max - 1e-5
    elif rule.domain == 'discrete':
        limit = math.log(rule.rho_max) / rule.delta_ref
        assert values.real.max() <= limit + 2e-4
    else:
        assert values.abs().max() <= rule.rho_max * (1 + 2e-4)


@rules
@kinds
def test_projection_obeys_and_is_idempotent(kind, rule):
    """The second time not a bit changes."""
    matrix = disturb(build(kind))
    matrix.apply_(rule)
    assert_obeys(matrix, rule)
    if hasattr(matrix, 'blocks') and getattr(rule, 'lambda_max', None):
        return  # best effort, see the rule's docstring
    once = [p.clone() for p in matrix.parameters()]
    matrix.apply_(rule)
    assert all(map(torch.equal, matrix.parameters(), once))


@pytest.mark.parametrize(
    'rule',
    [
        SpectralNormalization(rho_max=100.0),
        SpectralNormalization(rho_max=100.0, granularity='layer'),
        SpectralNormalization(domain='discrete'),
        EigenvalueClamping(),
        EigenvalueClamping(method='eig', lambda_max=100.0),
    ],
    ids=str,
)
@kinds
def test_nothing_changes_where_the_rule_holds(kind, rule):
    matrix = build(kind)
    before = [p.clone() for p in matrix.parameters()]
    matrix.apply_(rule)
    assert all(map(torch.equal, matrix.parameters(), before))


@rules
@kinds
def test_reparametrization_obeys_too(kind, rule):
    """The raw parameters stay, what the scan uses obeys, gradients flow."""
    if isinstance(rule, EigenvalueClamping) and rule.method == 'schur':
        pytest.skip('not differentiable, refused by the hook')
    matrix = disturb(build(kind))
    before = [p.clone() for p in matrix.parameters()]
    matrix.reparametrizations = [rule]
    assert_obeys(matrix, rule)
    B, C = torch.randn(2, 1, 5, matrix.numbers * 8)
    scanned = scan_matrices(matrix, B, C)
    if scanned is not None:
        assert (
            scanned.A.real.max()
            <= matrix.eigenvalues().real.amax(-1).max() + 1e-4
        )
        loss = sum(x.abs().square().sum() for x in scanned)
        loss.backward()
        grads = [p.grad for p in matrix.parameters()]
        assert all(torch.isfinite(g).all() and g.any() for g in grads)
    assert all(map(torch.equal, matrix.parameters(), before))


@pytest.mark.parametrize('kind', ['signed', 'complex free', 'full'])
def test_projection_and_reparametrization_agree(kind):
    """The same effective eigenvalues, from the same raw parameters."""
    rules = [SpectralNormalization(rho_max=2.0), EigenvalueClamping()]
    raw = disturb(build(kind))
    projected, free = copy.deepcopy(raw), copy.deepcopy(raw)
    projected.apply_(*rules)
    free.reparametrizations = rules
    a, b = projected.eigenvalues(), free.eigenvalues()
    gap = (a[..., None] - b[..., None, :]).abs().amin(-1)
    assert gap.max() <= 1e-4


def test_normalization_survives_huge_logarithms():
    """In log space nothing overflows."""
    matrix = build('neg_exp')
    matrix.A_log.data.fill_(200.0)
    matrix.apply_(SpectralNormalization(rho_max=4.0))
    assert torch.allclose(matrix.eigenvalues(), torch.tensor(-4.0))


def test_zero_stays_zero():
    matrix = build('signed')
    matrix.A.data.zero_()
    matrix.apply_(SpectralNormalization())
    assert not matrix.A.any()


def test_discrete_normalization_is_division_of_the_exponential():
    """exp(delta A) / radius equals exp(delta (A - alpha I))."""
    matrix = full_of(detmat(4, 4, 0), 4)
    before = matrix.dense()[0].detach()
    step = 0.3
    a_bar = torch.matrix_exp(step * before)
    radius = torch.linalg.eigvals(a_bar).abs().max()
    assert radius.item() == pytest.approx(1.4802471773, abs=1e-9)
    matrix.apply_(SpectralNormalization(domain='discrete'))
    after = torch.matrix_exp(step * matrix.dense()[0])
    assert torch.allclose(after, a_bar / radius, atol=1e-12)


# ------------------------------------------------------- eigenvalue clamping


def clamped(dense, method, **options):
    matrix = full_of(torch.tensor(dense).double(), 2)
    matrix.apply_(EigenvalueClamping(eps=0.1, method=method, **options))
    return matrix.dense()[0].detach()


@pytest.mark.parametrize('method', ['eig', 'schur', 'shift'])
def test_rotation_is_clamped(method):
    wanted = torch.tensor([[-0.1, 2], [-2, -0.1]]).double()
    found = clamped([[1.0, 2], [-2, 1]], method)
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ('method', 'wanted'),
    [
        ('eig', [[-0.1, 3.625], [0, -3]]),
        ('schur', [[-0.1, 5], [0, -3]]),
        ('shift', [[-0.1, 5], [0, -4.1]]),
    ],
)
def test_methods_differ_as_they_should(method, wanted):
    found = clamped([[1.0, 5], [0, -3]], method)
    assert torch.allclose(found, torch.tensor(wanted).double(), atol=1e-6)


def test_inexact_fit_is_finished_by_a_shift():
    """Blocks plus low rank cannot hold every clamped matrix."""
    blocks = torch.block_diag(detmat(4, 4, 0), detmat(4, 4, 5))
    matrix = full_of(blocks, 4, 0.7 * detmat(8, 1, 1), detmat(8, 1, 2))
    report = matrix.apply_(EigenvalueClamping(method='eig', eps=0.1))
    assert report['fit_residual'].max() > 0.01
    assert matrix.eigenvalues().real.max() <= -0.1 + 1e-6


def test_gradient_passes_a_clamp():
    """So that a parameter at its bound can come back."""
    matrix = build('signed')
    matrix.A.data.fill_(2.0)
    matrix.reparametrizations = [EigenvalueClamping()]
    matrix.eigenvalues().sum().backward()
    assert torch.equal(matrix.A.grad, torch.ones_like(matrix.A))


@pytest.mark.parametrize('kind', ['signed', 'complex free'])
def test_literal_gradient_of_a_clamp(kind):
    """None for what is clamped; a stuck parameter never returns."""
    matrix = build(kind)
    rule = EigenvalueClamping(eps=2.5, lambda_max=100.0, grad='clamp')
    # -1 and -2 are clamped
    if kind == 'complex free':
        with torch.no_grad():
            matrix.re.copy_(-torch.arange(1.0, 9).expand(8, 8))
            matrix.im.zero_()
    matrix.reparametrizations = [rule]
    matrix.eigenvalues().real.sum().backward()
    grad = matrix.free[0].grad
    clamped = torch.arange(8) < 2
    assert torch.allclose(grad[:, clamped], torch.tensor(0.0), atol=1e-5)
    assert torch.allclose(grad[:, ~clamped], torch.tensor(1.0), atol=1e-4)


@pytest.mark.parametrize('kind', ['neg_exp', 'signed', 'complex free', 'full'])
@pytest.mark.parametrize('domain', ['continuous', 'discrete'])
def test_scale_without_gradient(kind, domain):
    """The matrix is as with it, its gradient that of a constant scale."""
    gradients = []
    for detached in (False, True):
        matrix = disturb(build(kind), 0.3).double()
        rule = SpectralNormalization(
            rho_max=0.5, domain=domain, detach_scale=detached
        )
        matrix.reparametrizations = [rule]
        values = matrix.eigenvalues()
        assert_obeys(matrix, rule)
        (values.real.sin().sum()).backward()
        gradients.append(matrix.free[0].grad)
        if detached and kind == 'signed':
            a = matrix.A.detach()
            if domain == 'continuous':
                scale = a.abs().amax(-1, keepdim=True) / 0.5
                wanted = (a / scale).cos() / scale
            else:
                target = math.log(0.5) / rule.delta_ref
                wanted = (a - (a.amax(-1, keepdim=True) - target)).cos()
            assert torch.allclose(gradients[1], wanted)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@kinds
def test_non_finite_parameters_raise(kind, bad):
    matrix = build(kind)
    next(matrix.parameters()).data.view(-1)[3] = bad
    with pytest.raises(ValueError, match='not clamped away'):
        matrix.apply_(EigenvalueClamping())
    with pytest.raises(ValueError, match='not clamped away'):
        matrix.apply_(SpectralNormalization())


# ----------------------------------------------------------------- layers


@kinds
def test_in_a_layer(kind):
    """Forward, backward, both directions at once, in bfloat16 as well."""
    torch.manual_seed(0)
    a, b = (
        make_ssm(8, 8, 2, reverse=r, state_matrix=KINDS[kind])
        for r in (False, True)
    )
    together = SelectiveSSM(8, 8, 2, BIDIRECTIONAL, KINDS[kind])
    other = b.state_dict()
    together.load_state_dict(
        {k: torch.cat([v, other[k]]) for k, v in a.state_dict().items()}
    )
    x = torch.randn(2, 11, 8, requires_grad=True)
    both = together(x.expand(2, -1, -1, -1))
    alone = torch.stack([run(a, x), run(b, x)])
    assert torch.allclose(both, alone, atol=1e-6)
    flipped = make_ssm(8, 8, 2, reverse=True, state_matrix=KINDS[kind])
    flipped.load_state_dict(a.state_dict())
    found = run(flipped, x.flip(1)).flip(1)
    assert torch.allclose(found, both[0], atol=1e-5)
    both.sin().sum().backward()
    for name, p in together.named_parameters():
        if name.endswith('state_matrix.V') or name.endswith('.im'):
            continue  # U is zero at the start; im of the mode 0 too
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    with torch.autocast('cpu', torch.bfloat16):
        narrow = together(x.bfloat16().expand(2, -1, -1, -1))
        token = torch.randn(2, 11, a.sizes[1]).bfloat16()
        scanned = scan_matrices(a.state_matrix, token, token)
        inside = a.state_matrix.eigenvalues()
    for A in (scanned.A, inside):
        assert A.dtype in (torch.float32, torch.complex64)
    assert narrow.dtype == torch.bfloat16
    assert (narrow - both).abs().max() <= 0.05 * both.abs().max()


def test_observers_see_the_step_size():
    ssm = SelectiveSSM(8, 4, 2, BIDIRECTIONAL)
    seen = []
    ssm.observers.append(seen.append)
    u = torch.randn(2, 3, 11, 8)
    ssm(u)
    assert seen[0].shape == u.shape
    for k in range(2):
        rows = ssm.by_direction(ssm.x_proj.weight)[k, :2]
        raw = u[k] @ rows.mT @ ssm.by_direction(ssm.dt_proj.weight)[k].mT
        step = F.softplus(raw + ssm.by_direction(ssm.dt_bias)[k])
        assert torch.allclose(seen[0][k], step, atol=1e-6)


def test_found_by_name():
    model = torch.nn.Sequential(make_ssm(4, 2), make_ssm(4, 2))
    assert list(state_matrices(model)) == ['0.state_matrix', '1.state_matrix']


def test_defaults():
    """Those that configs leave out."""
    full = build_state_matrix(8, 8, 'full')
    assert full.blocks.shape == (1, 4, 2, 2)
    assert full.U.shape == (1, 8, 1)
    assert full.parametrization.kappa_max == 1e3
    assert isinstance(build_state_matrix(8, 8).parametrization, NegExp)
    assert make_ssm(8).b_disc == 'euler'
    normalization, clamping = SpectralNormalization(), EigenvalueClamping()
    assert vars(normalization) == dict(
        rho_max=1.0,
        domain='continuous',
        granularity='channel',
        delta_ref=SelectiveSSM.dt_max,
        radius='exact',
        detach_scale=False,
    )
    assert vars(clamping) == dict(
        domain='continuous',
        eps=0.01,
        margin=1e-3,
        delta_ref=SelectiveSSM.dt_max,
        lambda_max=None,
        method=None,
        grad='ste',
        condition_max='auto',
    )


# --------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(type='dense'), "one of .*'full'.* got 'dense'"),
        (dict(type='full', block_size=3), 'block_size must be a divisor'),
        (dict(type='full', block_size=0), 'block_size must be a divisor'),
        (dict(type='full', groups=3), 'groups must be a divisor of d_inner'),
        (dict(type='full', rank=9), 'rank must be from 0 to d_state = 8'),
        (dict(type='full', kappa_max=0.5), 'kappa_max must be at least 1'),
        (dict(type='complex', real_part='exp'), 'real_part must be one of'),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_state_matrix(8, 8, **options)


@pytest.mark.parametrize(
    ('rule', 'options', 'message'),
    [
        (SpectralNormalization, dict(rho_max=0.0), 'rho_max must be positive'),
        (SpectralNormalization, dict(rho_max=-1.0), 'rho_max must be positi'),
        (
            SpectralNormalization,
            dict(rho_max=1.5, domain='discrete'),
            'at most 1 in the discrete domain',
        ),
        (
            SpectralNormalization,
            dict(domain='discrete', granularity='block'),
            "'block' needs the continuous domain",
        ),
        (
            SpectralNormalization,
            dict(domain='s'),
            "domain must be one of .*'d",
        ),
        (
            SpectralNormalization,
            dict(granularity='row'),
            "granularity must be one of .*'block'",
        ),
        (SpectralNormalization, dict(radius='power'), 'radius must be one of'),
        (EigenvalueClamping, dict(eps=-0.1), 'eps must be at least 0'),
        (EigenvalueClamping, dict(margin=1.0), 'margin must be between'),
        (EigenvalueClamping, dict(method='svd'), "method must be one of .*'s"),
        (EigenvalueClamping, dict(grad='none'), "grad must be one of .*'ste'"),
        (
            EigenvalueClamping,
            dict(eps=2.0, lambda_max=1.0),
            'lambda_max must be at least the distance 2.0',
        ),
        (
            EigenvalueClamping,
            dict(condition_max=0.5),
            "condition_max must be a number from 1 on, 'auto' or None",
        ),
    ],
    ids=str,
)
def test_bad_rules(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule(**options)


def test_blocks_are_for_full_matrices():
    with pytest.raises(ValueError, match=r"one of \('channel', 'layer'\)"):
        build('signed').apply_(SpectralNormalization(granularity='block'))
