"""After a projection what is stored obeys, and a second one changes nothing.

``MMSTABVIM_FUZZ=500`` makes the campaign of it: so many matrices of each
kind, and 50 starts of 500 steps of the adversary.
"""

import copy
import itertools
import math
import os

import numpy as np
import pytest
import torch

from mmstabvim.layers.selective_ssm import SelectiveSSM
from mmstabvim.layers.state_matrix import (
    EigenvalueClamping,
    Full,
    SpectralNormalization,
    build_state_matrix,
)
from mmstabvim.stability import state_gain_bound

COUNT = int(os.environ.get('MMSTABVIM_FUZZ', 6))
STARTS, STEPS = (50, 500) if COUNT >= 500 else (6, 25)
SHAPES = [(2, 1, 8), (8, 0, 8), (16, 1, 16), (2, 2, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def random_full(shape, scale, count=COUNT, seed=0):
    torch.manual_seed(seed)
    block_size, rank, size = shape
    matrix = build_state_matrix(
        count, size, 'full', block_size=block_size, rank=rank, groups=count
    )
    with torch.no_grad():
        for parameter in matrix.parameters():
            size = scale if parameter.dim() == 4 else scale**0.5
            parameter.normal_().mul_(size)
    return matrix


def stored(matrix):
    """The dense matrices in NumPy, assembled anew."""
    blocks, *factors = (p.detach().double().numpy() for p in matrix.free)
    groups, count, size, _ = blocks.shape
    dense = np.zeros((groups, count * size, count * size))
    for k in range(count):
        part = slice(k * size, (k + 1) * size)
        dense[:, part, part] = blocks[:, k]
    if factors:
        dense += factors[0] @ factors[1].transpose(0, 2, 1)
    return dense


def assert_stable(matrix, eps=0.01, condition_max=1e3):
    """By LAPACK as NumPy calls it; the band is that of the guarantee."""
    dense = stored(matrix)
    values, vectors = np.linalg.eig(dense)
    band = 1e-9 * np.linalg.norm(dense, axis=(1, 2))
    assert (values.real.max(1) <= -eps + band).all()
    assert (np.linalg.cond(vectors) <= condition_max).all()


def bits(matrix):
    return [p.detach().clone() for p in matrix.free]


def again(matrix, *rules):
    """Another application, which remembers nothing of the first."""
    before = bits(matrix)
    twin = copy.deepcopy(matrix)
    twin.parametrization = matrix.parametrization.fresh()
    twin.apply_(*rules)
    return all(map(torch.equal, before, bits(twin)))


@pytest.mark.parametrize('method', ['shift', 'eig', 'schur'])
@pytest.mark.parametrize('scale', [0.1, 1.0, 10.0])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_random_full_matrices(shape, scale, method):
    rule = EigenvalueClamping(method=method)
    for dtype in DTYPES:
        matrix = random_full(shape, scale).to(dtype)
        matrix.apply_(rule)
        assert_stable(matrix)
        assert again(matrix, rule)


def jordan(size, coupling, real=-1.0):
    dense = torch.diag(torch.full((size,), real))
    return dense + torch.diag(torch.full((size - 1,), coupling), 1)


def full_of(dense, dtype=torch.float32):
    """One block without low rank."""
    size = len(dense)
    matrix = build_state_matrix(1, size, 'full', block_size=size, rank=0).to(
        dtype
    )
    with torch.no_grad():
        matrix.blocks.copy_(dense)
    return matrix


HARD = {
    'zero': torch.zeros(4, 4),
    'nilpotent': torch.diag(torch.ones(5), 1),
    'equal': -torch.eye(6),
    'far from normal': jordan(8, 4.0),
    'triangle': jordan(8, 1e4, -2.0),
    'long': jordan(16, 8.0),
    'tiny': 1e-30 * torch.ones(4, 4),
    'rotations': torch.block_diag(*[torch.tensor([[0.5, -3], [3, 0.5]])] * 3),
}


@pytest.mark.parametrize('method', ['shift', 'eig', 'schur'])
@pytest.mark.parametrize('dense', HARD.values(), ids=HARD)
def test_hard_full_matrices(dense, method):
    """Jordan blocks, zeros, couplings of thousands."""
    rule = EigenvalueClamping(method=method)
    for dtype in DTYPES:
        matrix = full_of(dense, dtype)
        matrix.apply_(rule)
        assert_stable(matrix)
        assert again(matrix, rule)


def test_rotations_stay_rotations():
    """Blending keeps what turns: the frequencies, not the couplings."""
    turn = torch.tensor([[-1.0, -3.0], [3.0, -1.0]])
    dense = torch.block_diag(turn, turn)
    dense[:2, 2:] = 5e4 * torch.eye(2)  # two equal pairs, coupled: defective
    matrix = build_state_matrix(1, 4, 'full', block_size=2, rank=2)
    with torch.no_grad():
        matrix.blocks.copy_(turn.expand(1, 2, 2, 2))
        left, values, right = torch.linalg.svd(
            dense - torch.block_diag(turn, turn)
        )
        matrix.U.copy_(left[:, :2] * values[:2])
        matrix.V.copy_(right.mT[:, :2])
    matrix.apply_(EigenvalueClamping())
    assert_stable(matrix)
    assert matrix.projection.blend > 0.02
    imag = matrix.eigenvalues().imag
    assert (imag.abs() - 3).abs().max() < 1e-3


def test_an_unstable_start_is_shifted_rather_than_blended():
    """It costs no more of the couplings than a stable one."""
    shares = []
    for real in (-1.0, 5.0):
        matrix = full_of(jordan(8, 4.0, real))
        matrix.apply_(EigenvalueClamping())
        shares.append(matrix.projection.blend.item())
    assert shares[1] == pytest.approx(shares[0], abs=0.1)


def test_huge_matrices_are_refused():
    """Their rounding is larger than the distance that is asked for."""
    matrix = full_of(1e30 * torch.randn(4, 4))
    with pytest.raises(ValueError, match=r'layer\.3 cannot be kept at real'):
        matrix.apply_(EigenvalueClamping(), name='layer.3')
    matrix.apply_(EigenvalueClamping(), SpectralNormalization(rho_max=8.0))
    assert_stable(matrix)


def test_bounds_without_a_number_between_them():
    """bfloat16 has none from 1.001 to 1.002."""
    matrix = random_full((4, 0, 4), 1.0, 1).bfloat16()
    rule = EigenvalueClamping(eps=1.001, lambda_max=1.002)
    with pytest.raises(ValueError, match=r'layer\.3 cannot obey its rules in'):
        matrix.apply_(rule, name='layer.3')
    wide = random_full((4, 0, 4), 1.0, 1)
    wide.apply_(rule)
    assert_stable(wide, 1.001)


@pytest.mark.parametrize('rank', range(0, 9, 4))
@pytest.mark.parametrize('groups', [1, 8])
def test_any_rank_and_groups(rank, groups):
    matrix = build_state_matrix(
        8, 8, 'full', block_size=4, rank=rank, groups=groups
    )
    with torch.no_grad():
        for parameter in matrix.parameters():
            parameter.normal_(std=3)
    matrix.apply_(EigenvalueClamping())
    assert_stable(matrix)


KINDS = {
    'neg_exp': dict(type='neg_exp'),
    'signed': dict(type='signed'),
    'complex': dict(type='complex'),
    'complex free': dict(type='complex', real_part='free'),
    'full': dict(type='full', groups=4),
}
NORMALIZATIONS = [
    dict(rho_max=2.0),
    dict(rho_max=2.0, granularity='layer'),
    dict(rho_max=2.0, radius='gelfand'),
    dict(rho_max=2.0, granularity='block'),
    dict(rho_max=0.5, domain='discrete'),
    dict(rho_max=1.0, domain='discrete'),
]
CLAMPINGS = [
    dict(eps=0.5),
    dict(eps=0.5, lambda_max=1.5),
    dict(domain='discrete', margin=0.1),
    dict(eps=0.5, condition_max=None),
    dict(eps=0.5, condition_max=5.0),
]


def combinations():
    normalizations = [SpectralNormalization(**n) for n in NORMALIZATIONS]
    clampings = [EigenvalueClamping(**c) for c in CLAMPINGS]
    yield from ((rule,) for rule in (*normalizations, *clampings))
    for pair in itertools.product(normalizations, clampings):
        if not contradict(pair):
            yield pair


def contradict(pair):
    """A decay faster than ``lambda_max`` or ``rho_max`` allow."""
    fast = min(rule.abscissa_limit or 0.0 for rule in pair)
    normalization, clamping = pair
    slow = [clamping.lambda_max or math.inf]
    if normalization.domain == 'continuous':
        slow.append(normalization.rho_max)
    return -fast > min(slow)


@pytest.mark.parametrize('rules', combinations(), ids=str)
@pytest.mark.parametrize('kind', KINDS)
def test_every_rule_and_pair(kind, rules):
    """All hold together, in the numbers that are stored."""
    if kind != 'full' and getattr(rules[0], 'granularity', '') == 'block':
        return
    for dtype, seed in itertools.product(DTYPES, range(2)):
        torch.manual_seed(seed)
        matrix = build_state_matrix(8, 8, **KINDS[kind])
        with torch.no_grad():
            for parameter in matrix.parameters(recurse=False):
                parameter.add_(2 * torch.randn_like(parameter))
        matrix = matrix.to(dtype)
        matrix.apply_(*rules)
        assert_obeys(matrix.double(), rules, torch.finfo(dtype).eps)
        assert again(matrix.to(dtype), *rules)


def assert_obeys(matrix, rules, rounding):
    """With the bounds that docs/stabilizers.md gives."""
    with torch.no_grad():
        values = matrix.eigenvalues()
    pair = len(rules) == 2
    for rule in rules:
        limit = rule.abscissa_limit
        if limit is not None:
            slack = 1e-6 * max(1.0, abs(limit), values.abs().max())
            if isinstance(rule, EigenvalueClamping):
                slack = 0.0  # of a diagonal matrix not even rounding
                if isinstance(matrix.parametrization, Full):
                    slack = 1e-9 * torch.linalg.matrix_norm(matrix.dense())
                    slack = slack.max()
            assert values.real.max() <= limit + slack
        if isinstance(rule, EigenvalueClamping):
            if rule.lambda_max is not None:
                low = -rule.lambda_max
                assert values.real.min() >= low - 1e-6 * values.abs().max()
            if isinstance(matrix.parametrization, Full) and rule.condition_max:
                bound = {'auto': 1e3}.get(rule.condition_max)
                assert matrix.condition().max() <= (
                    bound or rule.condition_max
                )
        elif rule.domain == 'continuous' and rule.granularity != 'block':
            bound = rule.rho_max * (1 + 2e-6)
            if pair and values.is_complex():
                eps = -min(r.abscissa_limit or 0.0 for r in rules)
                eps *= 1 + rounding
                more = min(eps, 1e-3 * rule.rho_max)
                bound = max(rule.rho_max + more, bound)
                if not isinstance(matrix.parametrization, Full):
                    bound = max(bound, math.hypot(rule.rho_max, eps) + 1e-6)
            assert values.abs().max() <= bound


@pytest.mark.parametrize('kind', ['signed', 'full'])
@pytest.mark.parametrize('domain', ['continuous', 'discrete'])
def test_a_layer_shares_its_scale_or_shift(kind, domain):
    """Differences of eigenvalues, or their ratios, stay."""
    matrix = build_state_matrix(
        4, 4, type=kind, **(dict(groups=4, rank=0) if kind == 'full' else {})
    )
    with torch.no_grad():
        first = matrix.free[0]
        first += 3 * torch.rand(len(first)).view(-1, *[1] * (first.dim() - 1))
    before = matrix.eigenvalues().real.amax(-1).double()
    rule = SpectralNormalization(0.5, domain, granularity='layer')
    matrix.apply_(rule)
    after = matrix.eigenvalues().real.amax(-1).double()
    moved = after / before if domain == 'continuous' else after - before
    torch.testing.assert_close(moved, moved.mean().expand(4))
    assert again(matrix, rule)


@pytest.mark.parametrize('kind', KINDS)
def test_contradictory_rules(kind):
    matrix = build_state_matrix(4, 4, **{**KINDS[kind]})
    for pair in (
        (SpectralNormalization(0.5, 'discrete'), dict(lambda_max=1.0)),
        (SpectralNormalization(rho_max=0.1), dict(eps=0.2)),
    ):
        rules = pair[0], EigenvalueClamping(**pair[1])
        with pytest.raises(ValueError, match='the rules contradict each oth'):
            matrix.apply_(*rules)


def test_complex_normalization_in_log_space():
    """exp(90) is no float32."""
    matrix = build_state_matrix(2, 2, type='complex')
    with torch.no_grad():
        matrix.log_re.fill_(90.0)
        matrix.im.fill_(1e20)
    matrix.apply_(SpectralNormalization(rho_max=2.0))
    values = matrix.eigenvalues()
    torch.testing.assert_close(values.abs(), torch.full((2, 2), 2.0))
    assert torch.isfinite(torch.view_as_real(values.detach())).all()


def test_the_scan_runs_with_what_is_stored():
    """Token by token against SciPy's exponential, where it was perturbed."""
    from scipy.linalg import expm

    torch.manual_seed(0)
    for dense in (jordan(8, 4.0), jordan(8, 1e4, -2.0), jordan(6, 0.5)):
        ssm = SelectiveSSM(
            1,
            len(dense),
            state_matrix=dict(type='full', rank=0, block_size=len(dense)),
        )
        with torch.no_grad():
            ssm.state_matrix.blocks.copy_(dense)
        ssm.state_matrix.apply_(EigenvalueClamping())
        A = stored(ssm.state_matrix)[0]
        x = torch.randn(1, 12, 1)
        with torch.no_grad():
            y = ssm(x)[0, :, 0].double().numpy()
            u = torch.nn.functional.silu(
                ssm.conv1d(torch.nn.functional.pad(x.mT, (3, 0)))
            )[0, 0]
            dt, B, C = ssm.x_proj(u[:, None]).split(ssm.sizes, dim=-1)
            delta = ssm.step_size(dt @ ssm.dt_proj.weight.T)[:, 0]
        state = np.zeros(len(A))
        u, delta, B, C = (t.double().numpy() for t in (u, delta, B, C))
        for t in range(12):
            state = expm(delta[t] * A) @ state + delta[t] * B[t] * u[t]
            wanted = C[t] @ state + u[t]
            assert abs(y[t] - wanted) <= 1e-4 * max(1.0, np.abs(y).max())


@pytest.mark.parametrize('couplings', [1.0, 20.0])
@pytest.mark.parametrize('shape', [(4, 0, 4), (2, 2, 8)], ids=str)
def test_an_adversary_cannot_exceed_the_bound(shape, couplings):
    """Gradient ascent on A, steps and inputs, projected after each step.

    From strong couplings, with clamping of the real parts alone, states reach
    many times the bound.
    """
    matrix = random_full(shape, 1.0, STARTS, seed=1).double()
    if couplings > 1:
        with torch.no_grad():
            matrix.blocks.mul_(couplings).triu_(1)
    size, length, delta_max = shape[2], 24, 2.0
    raw = torch.randn(STARTS, length, dtype=torch.double, requires_grad=True)
    B = torch.randn(STARTS, length, size, dtype=torch.double)
    B.requires_grad_()
    optimizer = torch.optim.Adam([*matrix.parameters(), raw, B], lr=0.05)
    rule = EigenvalueClamping(eps=1.0, condition_max=10.0)
    matrix.apply_(rule)
    reached = torch.zeros(STARTS, dtype=torch.double)
    for _ in range(STEPS):
        optimizer.zero_grad()
        A = matrix.dense(matrix.free)
        delta = delta_max * raw.sigmoid()
        drive = torch.nn.functional.normalize(B, dim=-1)
        state = torch.zeros(STARTS, size, dtype=torch.double)
        for t in range(length):
            step = torch.linalg.matrix_exp(delta[:, t, None, None] * A)
            state = (step @ state[..., None])[..., 0]
            state = state + delta[:, t, None] * drive[:, t]
        norm = state.norm(dim=-1)
        with torch.no_grad():
            basis = matrix.eigenbasis()
            bound = state_gain_bound(
                basis.condition,
                basis.eigenvalues.real.amax(-1),
                torch.tensor(delta_max),
                length,
            )
            assert (norm <= bound).all()
            assert (basis.condition <= 10).all()
            assert (norm <= 10 * (1 / 1.0 + delta_max)).all()
            reached = reached.maximum(norm / bound)
        (-norm.log().sum()).backward()
        optimizer.step()
        matrix.apply_(rule)
    # and the bound is not an empty one
    assert reached.max() > 0.05
