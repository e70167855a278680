"""Stable rank normalization of matrices and of convolution kernels."""

import itertools
import math

import pytest
import torch
from stability_oracles import assert_printed, detmat, double

from mmstabvim.stability import (
    causal_stable_rank,
    frequency_planes,
    kernel_stable_rank,
    normalize_kernel_stable_rank,
    normalize_stable_rank,
    rank_one_kernel,
    sphere_descent,
    squared_gains,
    srn_c,
    stable_rank,
)
from mmstabvim.stability.weights.kernel_baselines import SphereObjective
from mmstabvim.stability.weights.sphere import to_sphere

W = detmat(5, 7)
TAPS = double([0.25, -0.5, 0.75, 1])
BLUR = torch.outer(double([1, 2, 1]), double([1, 2, 1])) / 16


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def orthogonal(size, seed):
    return torch.linalg.qr(random(size, size, seed=seed)).Q


# ---------------------------------------------------------------- matrices


def test_stable_rank_of_matrices():
    assert_printed(stable_rank(torch.diag(double([2, 1, 1]))), 1.5)
    assert_printed(stable_rank(W), 2.4716804032)
    assert stable_rank(torch.zeros(3, 4)) == 0
    assert_printed(stable_rank(torch.eye(6, 9).double()), 6.0)


def test_stable_rank_ignores_scale_and_rotation():
    turned = orthogonal(5, 1) @ W @ orthogonal(7, 2)
    for same in (1e-9 * W, -1e9 * W, turned, W.T):
        assert_printed(stable_rank(same), stable_rank(W))


def test_diagonal():
    A = torch.diag(double([2, 1, 1]))
    wanted = torch.diag(double([2, 0.5**0.5, 0.5**0.5]))
    assert_printed(normalize_stable_rank(A, 1.25), wanted)
    assert normalize_stable_rank(A, 2.0).equal(A)
    rank_one = torch.diag(double([2, 0, 0]))
    assert_printed(normalize_stable_rank(A, 1.0), rank_one)


def test_singular_values():
    found = normalize_stable_rank(W, 2.0)
    assert_printed(
        torch.linalg.svdvals(found),
        [2.6052079918, 1.8441367681, 1.4435377319, 0.9689741741, 0.6029561573],
    )
    gamma = torch.linalg.svdvals(found) / torch.linalg.svdvals(W)
    assert_printed(gamma, [1.0] + 4 * [0.8243150832])
    assert_printed(torch.linalg.matrix_norm(found - W), 0.5552436911)
    assert_printed(stable_rank(found), 2.0)


@pytest.mark.parametrize('preserved', [0, 1, 2, 3])
@pytest.mark.parametrize('shape', [(5, 7), (7, 5), (6, 6)], ids=str)
def test_closest_matrix(shape, preserved):
    """None of many matrices that obey the same rule is closer."""
    A = detmat(*shape)
    S = torch.linalg.svdvals(A)
    kept = S[:preserved].square().sum() / S[0].square()
    rank = (0.8 * kept.clamp(min=1) + 0.2 * stable_rank(A)).item()
    found = normalize_stable_rank(A, rank, preserved)
    assert_printed(stable_rank(found), rank)
    kept = torch.linalg.svdvals(found)
    assert_printed(kept[:preserved], S[:preserved])
    # by von Neumann's trace inequality the closest has the same vectors
    head, fixed = max(preserved, 1), S[:preserved]
    values = (S + 0.3 * random(20_000, len(S), seed=3)).abs()
    values[:, :preserved] = fixed
    values[:, head:] = values[:, head:].sort(descending=True).values
    first, rest = values[:, :head], values[:, head:]
    room = rank * first[:, 0].square() - first.square().sum(-1)
    rest = rest * (room / rest.square().sum(-1)).sqrt()[:, None]
    valid = rest[:, 0] <= first[:, -1]
    assert valid.sum() > 500
    others = torch.cat([first, rest], 1)[valid]
    distance = torch.linalg.vector_norm(others - S, dim=-1).min()
    assert torch.linalg.matrix_norm(found - A) <= distance * (1 + 1e-12)


def test_fewer_preserved_values_are_closer():
    distances = [
        torch.linalg.matrix_norm(normalize_stable_rank(W, 2.0, k) - W).item()
        for k in range(3)
    ]
    assert distances[0] < distances[1] - 0.01 < distances[2] - 0.02


def test_low_stable_rank_stays_bitwise():
    ranks = stable_rank(W).item()
    for A in (W, W.float(), torch.zeros(4, 3), torch.ones(4, 3)):
        assert normalize_stable_rank(A, ranks + 0.01).equal(A)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_matrices_idempotent(dtype):
    A = random(6, 40, 30, seed=1).to(dtype)
    once = normalize_stable_rank(A, 5.0)
    assert not torch.equal(once, A)
    assert once.dtype == dtype
    assert normalize_stable_rank(once, 5.0).equal(once)


def test_batches_are_separate():
    A = torch.stack([detmat(6, 9, tag) for tag in range(4)])
    each = torch.stack([normalize_stable_rank(m, 2.0) for m in A])
    assert_printed(normalize_stable_rank(A, 2.0), each)
    assert_printed(normalize_stable_rank(7 * A, 2.0), 7 * each)


def test_gradient_with_constant_vectors():
    """Gradients by hand, for changed and for unchanged matrices."""
    A = torch.stack([W, torch.zeros(5, 7), 1e-3 * W]).requires_grad_()
    weight = random(3, 5, 7)
    (normalize_stable_rank(A, 2.0) * weight).sum().backward()
    U, _, Vh = torch.linalg.svd(W)
    u, v = U[:, 0], Vh[0]
    B = W.clone().requires_grad_()
    sigma = u @ B @ v
    rest = B - sigma * torch.outer(u, v)
    gamma = sigma / torch.linalg.matrix_norm(rest)
    ((sigma * torch.outer(u, v) + gamma * rest) * weight[0]).sum().backward()
    assert_printed(A.grad[0], B.grad)
    assert A.grad[1].equal(weight[1])
    C = W.clone().requires_grad_()
    (normalize_stable_rank(C, 1.0) * weight[0]).sum().backward()
    assert C.grad.isfinite().all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(rank=0.9), 'rank must be at least 1, got 0.9'),
        (dict(rank=math.nan), 'rank must be at least 1, got nan'),
        (dict(rank=2, preserved=6), r'in 0\.\.5 for \(5, 7\), got 6'),
        (dict(rank=2, preserved=-1), 'got -1'),
        (
            dict(rank=1.5, preserved=2),
            r'at least 1\.737\d*, the stable rank of the 2 preserved',
        ),
    ],
    ids=str,
)
def test_refused_for_matrices(options, message):
    with pytest.raises(ValueError, match=message):
        normalize_stable_rank(W, **options)


@pytest.mark.parametrize(
    'A', [torch.ones(3), torch.ones(2, 2) * 1j, torch.full((2, 2), math.nan)]
)
def test_no_matrices(A):
    for function in (stable_rank, lambda A: normalize_stable_rank(A, 1.0)):
        with pytest.raises(ValueError, match='must be'):
            function(A)


# ------------------------------------------------------ spectra of kernels


def circulant(kernel, size):
    """The matrix of a circular convolution in one or two dimensions."""
    spots = list(itertools.product(*map(range, size)))
    matrix = torch.zeros(len(spots), len(spots), dtype=torch.float64)
    taps = itertools.product(*map(range, kernel.shape))
    for tap, (column, spot) in itertools.product(taps, enumerate(spots)):
        moved = [(i + j) % n for i, j, n in zip(spot, tap, size, strict=True)]
        matrix[spots.index(tuple(moved)), column] += kernel[tap]
    return matrix


@pytest.mark.parametrize(
    ('kernel', 'size'),
    [
        (TAPS, (16,)),
        (TAPS, (17,)),
        (TAPS, (4,)),
        (double([2.0]), (1,)),
        (detmat(3, 2), (4, 7)),
        (detmat(2, 3), (5, 6)),
    ],
    ids=lambda x: 'x'.join(map(str, x if isinstance(x, tuple) else x.shape)),
)
def test_spectrum_of_the_explicit_circulant(kernel, size):
    matrix = circulant(kernel, size)
    wanted = torch.linalg.svdvals(matrix).square()
    found = squared_gains(kernel, size)
    assert_printed(found.max(), wanted.max())
    for value in found:
        assert (wanted - value).abs().min() < 1e-9
    assert_printed(kernel_stable_rank(kernel, size), stable_rank(matrix))


def test_printed_stable_ranks():
    assert_printed(kernel_stable_rank(TAPS, 16), 11.5940246158)
    assert_printed(kernel_stable_rank(TAPS, 14), 9.9484953081)
    assert_printed(causal_stable_rank(TAPS, 14), 9.8037591491)
    three = double([0.25, -0.5, 0.75])
    assert_printed(kernel_stable_rank(three, 64), 24.8888888889)
    assert_printed(kernel_stable_rank(BLUR, (8, 8)), 9.0)


def test_causal_is_the_layer_on_a_sequence():
    """Against the convolution itself, applied to unit impulses."""
    conv = torch.nn.Conv1d(2, 2, 4, padding=3, groups=2, bias=False).double()
    conv.weight.data = torch.stack([TAPS, TAPS.flip(0)])[:, None]
    impulses = torch.eye(14).double()[:, None].expand(-1, 2, -1)
    out = conv(impulses)[..., :14].detach()  # (impulse, channel, token)
    matrices = out.permute(1, 2, 0)
    found = causal_stable_rank(conv.weight.detach()[:, 0], 14)
    assert_printed(found, stable_rank(matrices))
    assert_printed(matrices[0].square().sum(), 25.0)
    assert causal_stable_rank(torch.zeros(4), 9) == 0


def test_layer_is_one_matrix():
    """The depthwise layer is block diagonal."""
    kernels = detmat(3, 4)
    blocks = torch.block_diag(*[circulant(k, (9,)) for k in kernels])
    found = kernel_stable_rank(kernels, 9, granularity='layer')
    assert_printed(found, stable_rank(blocks))
    assert kernel_stable_rank(torch.zeros(2, 3), 9).tolist() == [0, 0]


@pytest.mark.parametrize('points', [16, 17, 64])
@pytest.mark.parametrize('taps', [1, 2, 3, 4])
def test_planes_of_sequences(taps, points):
    """Eigenvalues by the closed form and by the eigenvalue solver."""
    planes = frequency_planes((taps,), (points,))
    angle = 2 * math.pi * torch.arange(points // 2 + 1).double() / points
    phase = torch.outer(angle, torch.arange(taps).double())
    waves = torch.stack([phase.cos(), phase.sin()], -1)
    B = waves @ waves.mT
    wanted = torch.linalg.eigvalsh(B).flip(-1)
    torch.testing.assert_close(planes.largest, wanted[:, 0])
    if taps > 1:
        torch.testing.assert_close(planes.second, wanted[:, 1])
        inner = slice(1, (points - 1) // 2 + 1)  # without 0 / 0
        spread = (torch.sin(taps * angle) / torch.sin(angle)).abs()[inner]
        closed = (taps + spread) / 2
        torch.testing.assert_close(planes.largest[inner], closed)
    peak = planes.largest == planes.largest.max()
    ends = [0, points // 2] if points % 2 == 0 else [0]
    if taps > 1:
        assert peak.nonzero()[:, 0].tolist() == ends
    assert planes.largest.max().item() == pytest.approx(taps)
    x = random(5, taps)
    assert_printed(planes.gains(x), squared_gains(x, points))


def test_planes_of_images():
    planes = frequency_planes((3, 2), (6, 5))
    x = random(4, 3, 2)
    assert_printed(planes.gains(x.flatten(1)), squared_gains(x, (6, 5)))
    for axis in (planes.first_axis, planes.second_axis):
        norms = axis.square().sum(-1)
        assert ((norms - 1).abs().lt(1e-9) | norms.eq(0)).all()
    products = (planes.first_axis * planes.second_axis).sum(-1)
    assert products.abs().max() < 1e-9


# ---------------------------------------------------- kernels, exact solver


@pytest.mark.parametrize(
    ('kernel', 'points', 'rank', 'wanted', 'distance'),
    [
        ([1, 0, 0], 64, 32, [2 / 3, 1 / 6, 1 / 6], 6**-0.5),
        (
            [0.5, 1, -0.25],
            64,
            30,
            [0.4777266875, 0.7463255254, 0.0748284308],
            0.4127473186,
        ),
        (
            [0.25, -0.5, 0.75],
            64,
            24,
            [0.2834936491, -0.5, 0.7165063509],
            0.0473671727,
        ),
        (
            [0.25, -0.5, 0.75, 1],
            16,
            8,
            [0.3143903845, -0.2121420513, 0.6654120083, 0.8409228202],
            0.3456428760,
        ),
        ([0.25, -0.5, 0.75, 1], 16, 4, [0.4021457904] * 4, None),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else '',
)
def test_printed_kernels(kernel, points, rank, wanted, distance):
    kernel = double(kernel)
    found = normalize_kernel_stable_rank(kernel, points, rank)
    assert_printed(found, wanted)
    if distance:
        assert_printed(torch.linalg.vector_norm(found - kernel), distance)
    check_constraints(kernel, found, points, rank)


def check_constraints(kernels, found, size, rank):
    """Stable rank and largest singular value to twelve digits."""
    ranks = kernel_stable_rank(found, size)
    torch.testing.assert_close(
        ranks, torch.full_like(ranks, rank), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        squared_gains(found, size).amax(-1),
        squared_gains(kernels, size).amax(-1),
        rtol=1e-12,
        atol=0,
    )


def test_closer_than_straight_paths():
    """Active frequencies that are neither zero nor the highest.

    Straight paths to top eigenvectors reach 0.0756 here, a scan of each
    frequency's ellipse 0.0672166579.
    """
    found = normalize_kernel_stable_rank(TAPS, 16, 11)
    distance = torch.linalg.vector_norm(found - TAPS)
    assert distance.item() == pytest.approx(0.0672062525)
    check_constraints(TAPS, found, 16, 11)


def gains_of(x, size):
    return squared_gains(x, size).amax(-1)


CASES = {
    'three taps': (3, (64,)),
    'odd length': (3, (17,)),
    'four taps': (4, (16,)),
    'as long as the sequence': (4, (4,)),
    'two taps': (2, (9,)),
}


@pytest.mark.parametrize('share', [0.02, 0.4, 0.9])
@pytest.mark.parametrize('case', CASES)
def test_no_closer_kernel_with_less_stable_rank(case, share):
    """Among many points of the sphere whose stable rank is as low."""
    taps, size = CASES[case]
    points = math.prod(size)
    for seed in range(4):
        kernel = random(taps, seed=seed)
        low, high = points / taps, kernel_stable_rank(kernel, size).item()
        rank = low + share * (high - low)
        found = normalize_kernel_stable_rank(kernel, size, rank)
        check_constraints(kernel, found, size, rank)
        unit = kernel / kernel.norm()
        near = found / found.norm() + 0.2 * random(20_000, taps, seed=9)
        wide = random(20_000, taps, seed=8)
        x = torch.cat([near, wide, -wide])
        x = x / x.norm(dim=-1, keepdim=True)
        allowed = gains_of(x, size) >= points / rank
        assert allowed.any()
        best = (x[allowed] @ unit).max()
        assert best <= (found / found.norm()) @ unit + 1e-12


@pytest.mark.parametrize('rank', [22, 30, 32])
def test_kernel_without_the_leading_waves(rank):
    """(1, 0, -1) has no part of the two waves of the largest gain."""
    kernel = double([1, 0, -1])
    assert kernel_stable_rank(kernel, 64) == 32
    found = normalize_kernel_stable_rank(kernel, 64, rank)
    check_constraints(kernel, found, 64, rank)
    if rank == 32:
        assert found.equal(kernel)
        return
    x = random(60_000, 3, seed=2)
    x = x / x.norm(dim=-1, keepdim=True)
    best = (x[gains_of(x, 64) >= 64 / rank] @ kernel).max() / 2**0.5
    assert best <= found @ kernel / (found.norm() * 2**0.5) + 1e-12


@pytest.mark.parametrize(
    ('taps', 'size'), [((3, 3), (8, 8)), ((2, 4), (7, 5)), ((7, 7), (14, 14))]
)
def test_kernels_of_images(taps, size):
    kernels = random(6, *taps, seed=5)
    ranks = kernel_stable_rank(kernels, size)
    low = math.prod(size) / math.prod(taps)
    rank = (low + ranks.min().item()) / 2
    found = normalize_kernel_stable_rank(kernels, size, rank)
    check_constraints(kernels, found, size, rank)
    assert found.shape == kernels.shape
    points = random(2000, *taps, seed=6)
    for kernel, new in zip(kernels, found, strict=True):
        x = new / new.norm() + 0.05 * points
        x = x / x.flatten(1).norm(dim=-1)[:, None, None]
        allowed = gains_of(x, size) >= math.prod(size) / rank
        cosines = (x * kernel).sum((1, 2))[allowed] / kernel.norm()
        own = (new * kernel).sum() / (new.norm() * kernel.norm())
        assert allowed.any()
        assert cosines.max() <= own + 1e-12


def test_blur():
    found = normalize_kernel_stable_rank(BLUR, (8, 8), 8)
    check_constraints(BLUR, found, (8, 8), 8)
    flat = normalize_kernel_stable_rank(BLUR, (8, 8), 64 / 9)
    assert_printed(flat, torch.full((3, 3), 1 / 9).double())


@pytest.mark.parametrize('mode', ['reduce', 'equal'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_kernels_idempotent(dtype, mode):
    kernels = random(300, 4, seed=7).to(dtype)
    once = normalize_kernel_stable_rank(kernels, 65, 30, mode)
    changed = (once != kernels).any(-1)
    assert once.dtype == dtype
    found = kernel_stable_rank(kernels, 65)
    assert changed.equal(found > 30 if mode == 'reduce' else found > 0)
    assert normalize_kernel_stable_rank(once, 65, 30, mode).equal(once)
    scaled = normalize_kernel_stable_rank(64 * kernels, 65, 30, mode)
    assert scaled.equal(64 * once)


def test_batches_of_kernels_are_separate():
    """Also where only few frequencies are looked at, or many at once."""
    kernels = random(40, 4, seed=1)
    each = [normalize_kernel_stable_rank(k, 33, 12.0) for k in kernels]
    both = normalize_kernel_stable_rank(kernels.reshape(2, 20, 4), 33, 12.0)
    torch.testing.assert_close(both.reshape(40, 4), torch.stack(each))


def test_nothing_to_do():
    kernels = torch.stack([torch.zeros(3), torch.ones(3)])
    for mode in ('reduce', 'equal'):
        found = normalize_kernel_stable_rank(kernels, 9, 3.0, mode)
        assert found.equal(kernels)
    one_tap = double([[2.0]])
    assert normalize_kernel_stable_rank(one_tap, 9, 9.0).equal(one_tap)
    for solver in ('exact', 'rgd', 'srn_c'):
        found = normalize_kernel_stable_rank(kernels, 9, 9.0, solver=solver)
        assert found.equal(kernels)


@pytest.mark.parametrize('share', [0.05, 0.5, 0.9])
@pytest.mark.parametrize('taps', [2, 3, 4, 5])
def test_raising(taps, share):
    """No random point of the sphere with a stable rank as high is closer."""
    for seed in range(3):
        kernel = random(taps, seed=seed)
        rank = kernel_stable_rank(kernel, 32).item()
        rank += share * (32 - rank)
        found = normalize_kernel_stable_rank(kernel, 32, rank, 'equal')
        check_constraints(kernel, found, 32, rank)
        unit, own = kernel / kernel.norm(), found / found.norm()
        near = own + 0.1 * random(20_000, taps, seed=9)
        x = torch.cat([near, random(20_000, taps, seed=8)])
        x = x / x.norm(dim=-1, keepdim=True)
        allowed = gains_of(x, 32) <= 32 / rank
        assert allowed.sum() > 10
        assert own @ unit >= (x[allowed] @ unit).max() - 1e-9


def test_raising_images():
    kernels = random(3, 3, 3, seed=2)
    rank = kernel_stable_rank(kernels, (6, 5)).max().item() + 2
    found = normalize_kernel_stable_rank(kernels, (6, 5), rank, 'equal')
    check_constraints(kernels, found, (6, 5), rank)
    x = to_sphere(found.flatten(1)) + 0.05 * random(5000, 3, 9, seed=3)
    x = to_sphere(x)
    allowed = gains_of(x.unflatten(-1, (3, 3)), (6, 5)) <= 30 / rank
    unit = to_sphere(kernels.flatten(1))
    cosines = torch.where(allowed, (x * unit).sum(-1), -1.0).amax(0)
    own = (to_sphere(found.flatten(1)) * unit).sum(-1)
    assert allowed.any(0).all()
    assert (own >= cosines - 1e-9).all()


def test_raised_to_a_single_tap():
    found = normalize_kernel_stable_rank(TAPS, 16, 16, 'equal')
    assert_printed(found, [0, 0, 0, squared_gains(TAPS, 16).max() ** 0.5])


@pytest.mark.parametrize('rank', [21.33, 64.1, 0, math.nan])
def test_infeasible_targets(rank):
    message = r'rank must be in \[21\.3333, 64\], .* kernels of 3 taps'
    with pytest.raises(ValueError, match=message):
        normalize_kernel_stable_rank(torch.ones(3), 64, rank)


@pytest.mark.parametrize(
    ('kernels', 'size', 'options'),
    [
        (torch.ones(5), 4, {}),
        (torch.ones(5), (4, 4), {}),
        (torch.ones(5) * 1j, 8, {}),
        (torch.full((5,), math.inf), 8, {}),
        (torch.ones(5), (), {}),
        (torch.ones(0, 5), 8, {}),
        (torch.ones(5), 8, dict(mode='raise')),
        (torch.ones(5), 8, dict(solver='newton')),
    ],
)
def test_refused_for_kernels(kernels, size, options):
    with pytest.raises(ValueError, match='must be'):
        normalize_kernel_stable_rank(kernels, size, 4.0, **options)
    with pytest.raises(TypeError, match='alpa'):
        normalize_kernel_stable_rank(
            TAPS, 16, 8, solver='rgd', alpa=1.0, steps=1
        )


# --------------------------------------------------- solvers to compare with


def test_objective_as_written():
    """Value by the formula, gradient by autograd."""
    kernel, rank, alpha = double([0.5, 1, -0.25]), 30, 7.0
    z = torch.nn.functional.normalize(random(3), dim=0).requires_grad_()
    gains = torch.fft.fft(z, 64).abs().square()
    smooth = torch.logsumexp(alpha * gains, 0) / alpha
    radius = (rank * squared_gains(kernel, 64).max() / 64).sqrt()
    off = (radius * z - kernel).square().sum()
    value = (smooth - 64 / rank) ** 2 + 0.1 * 64 * off
    value.backward()
    objective = SphereObjective(kernel, 64, rank, alpha)
    found = objective.value_and_gradient(z.detach()[None])
    assert_printed(found[0][0], value.detach())
    assert_printed(found[1][0], z.grad)


def test_objective_of_images():
    z = torch.nn.functional.normalize(random(4), dim=0).requires_grad_()
    gains = torch.fft.fft2(z.reshape(2, 2), (5, 6)).abs().square()
    smooth = torch.logsumexp(10 * gains.flatten(), 0) / 10
    ((smooth - 30 / 10) ** 2).backward()
    objective = SphereObjective(detmat(2, 2), (5, 6), 10, penalty=0.0)
    assert_printed(
        objective.value_and_gradient(z.detach()[None])[1][0], z.grad
    )


@pytest.mark.parametrize(
    ('alpha', 'reached', 'ratio'),
    [(10.0, 49.58, 0.803), (200.0, 44.64, 0.847)],
)
def test_descent_misses_the_target(alpha, reached, ratio):
    """It ends far above the stable rank 32 that was asked for."""
    kernel = double([1, 0, 0])
    end = sphere_descent(kernel, 64, 32, alpha=alpha, steps=3000)
    assert end.stable_rank.item() == pytest.approx(reached, abs=0.005)
    assert end.gain_ratio.item() == pytest.approx(ratio, abs=5e-4)
    gains = squared_gains(end.kernels, 64)
    assert_printed(gains.max(), squared_gains(kernel, 64).max())
    through = normalize_kernel_stable_rank(
        kernel, 64, 32, solver='rgd', alpha=alpha, steps=3000
    )
    assert through.equal(end.kernels)


def test_descent_descends_on_the_sphere():
    kernels, seen = detmat(2, 3), []

    def note(number, values, points):
        seen.append((number, values.clone(), points.clone()))

    options = dict(step=1e-4, steps=50, callback=note)
    end = sphere_descent(kernels, 64, 32, **options)
    numbers, values, points = zip(*seen, strict=True)
    assert numbers == tuple(range(51))
    assert (torch.stack(values).diff(dim=0) < 0).all()
    norms = torch.stack(points).norm(dim=-1)
    assert_printed(norms, torch.ones_like(norms))
    assert end.point.equal(points[-1])
    gradient = SphereObjective(kernels, 64, 32).value_and_gradient(points[0])[
        1
    ]
    inward = (gradient * points[0]).sum(-1, keepdim=True) * points[0]
    step = to_sphere(points[0] - 1e-4 * (gradient - inward))
    torch.testing.assert_close(points[1], step, rtol=1e-15, atol=1e-15)
    again = sphere_descent(kernels, 64, 32, **options, start=points[0])
    assert again.point.equal(end.point)
    other = sphere_descent(kernels, 64, 32, **options, seed=1)
    assert not other.point.equal(end.point)


@pytest.mark.parametrize(
    'options',
    [
        dict(step=0.0),
        dict(steps=-1),
        dict(alpha=0.0),
        dict(penalty=-1.0),
        dict(start=torch.ones(1, 4)),
    ],
    ids=str,
)
def test_refused_for_the_descent(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sphere_descent(torch.ones(3), 9, 4, **options)


def test_counterexample_to_srn_c():
    """The blur is asked for a stable rank of 8 and a spectral norm of 1."""
    first = rank_one_kernel(BLUR, (8, 8))
    assert_printed(first, torch.ones(3, 3).double())
    gains = squared_gains(first, (8, 8))
    assert_printed(gains.max(), 81.0)
    matrix = circulant(first, (8, 8))
    assert torch.linalg.matrix_rank(matrix) == 64
    assert_printed(stable_rank(matrix), 64 / 9)
    found = srn_c(BLUR, (8, 8), 8)
    gamma = 0.9354143467
    assert_printed(found, 1 + gamma * (BLUR - 1))
    assert_printed(squared_gains(found, (8, 8)).max().sqrt(), 1.5166852265)
    assert_printed(kernel_stable_rank(found, (8, 8)), 7.8296057832)
    assert_printed(
        normalize_kernel_stable_rank(BLUR, (8, 8), 8, solver='srn_c'), found
    )
    assert_printed(srn_c(3 * BLUR, (8, 8), 8), 3 * found)
    with pytest.raises(ValueError, match=r'at least 1, got 0\.5'):
        srn_c(BLUR, (8, 8), 0.5)


@pytest.mark.parametrize('turn', [0.0, 0.7, 2.5])
@pytest.mark.parametrize(
    ('kernel', 'size'), [(TAPS, (16,)), (detmat(3, 2), (7, 9))]
)
def test_rank_one_kernel_is_the_gradient(kernel, size, turn):
    """Gradient of u^T (x * v) for singular vectors of the matrix.

    Away from zero and the highest frequency they are a pair, of which any
    turn gives the same.
    """
    matrix = circulant(kernel, size)
    _, S, Vh = torch.linalg.svd(matrix)
    v = Vh[0]
    if S[0] - S[1] < 1e-9:
        v = math.cos(turn) * Vh[0] + math.sin(turn) * Vh[1]
    u = matrix @ v / S[0]
    spots = torch.eye(kernel.numel()).double().reshape(-1, *kernel.shape)
    gradient = torch.stack([u @ circulant(x, size) @ v for x in spots])
    assert_printed(
        rank_one_kernel(kernel, size), gradient.reshape(kernel.shape)
    )
