"""Perturb-then-diagonalize: printed digits, proven bounds, the search."""

import itertools
import math

import pytest
import torch
from stability_oracles import assert_printed, detmat, double, hippo

from mmstabvim.stability import (
    Perturbation,
    diagonalize_perturbed,
    hippo_legs,
    hippo_response,
    perturb_then_diagonalize,
    random_perturbations,
    spectral_abscissa,
    state_response,
)
from mmstabvim.stability.state.eigenbasis import condition_number


def norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2).item()


def example(size):
    """A perturbation of norm 0.4 that needs no random numbers."""
    E = detmat(size, size)
    return 0.4 * E / norm(E)


def rebuilt(basis):
    """X diag(lambda) X^-1."""
    X = basis.vectors
    return (X * basis.eigenvalues) @ torch.linalg.inv(X)


# ------------------------------------------------------------ one example


@pytest.mark.parametrize(
    ('size', 'condition', 'abscissa', 'radius', 'trace'),
    [
        (4, 20.68806180, -0.4799716073, 4.0929658491, -10.0291492127),
        (8, 65.86688510, -0.7992412371, 13.7425473905, -36.3007873718),
        (16, 220.49357396, -0.9526554636, 39.8625548490, -135.9116598150),
    ],
)
def test_printed_spectra(size, condition, abscissa, radius, trace):
    basis = diagonalize_perturbed(hippo(size), example(size))
    assert basis.condition == pytest.approx(condition, rel=1e-9)
    assert basis.abscissa == pytest.approx(abscissa, abs=1e-9)
    assert_printed(basis.eigenvalues.abs().amax(), radius)
    assert_printed(basis.eigenvalues.sum().real, trace)
    assert basis.norm == pytest.approx(0.4, abs=1e-12)


def test_printed_deviations():
    """Errors of the response to a Fourier mode."""
    A, B = hippo_legs(16)
    omega = double([0.0, 1.0, 10.0])
    moved = state_response(A + example(16), B, omega)
    distance = (moved - hippo_response(16, omega)).norm(dim=1)
    assert_printed(
        distance, double([0.1394893180, 0.0728322802, 0.0396753127])
    )


def test_printed_exponential():
    A, E = hippo(16), example(16)
    found = norm(torch.matrix_exp(0.1 * (A + E)) - torch.matrix_exp(0.1 * A))
    assert found == pytest.approx(0.0296290054, abs=1e-9)
    assert found <= 0.1 * 0.4 * math.exp(0.1 * (-0.5 + 0.4))


@pytest.mark.parametrize(
    ('size', 'wanted'), [(8, 0.37242), (16, 0.19408), (64, 0.04904)]
)
def test_no_spike(size, wanted):
    """Responses of S4D-LegS that are 14 to 831 times those of HiPPO."""
    A, B = hippo_legs(size)
    spike = torch.linalg.eigvals(A + torch.outer(B, B) / 2).imag.max()
    response = state_response(A + example(size), B, spike[None]).norm()
    assert response.item() == pytest.approx(wanted, abs=6e-6)


@pytest.mark.parametrize('size', [1, 2, 7, 16, 33])
def test_decomposition_is_of_the_perturbed_matrix(size):
    A, E = hippo(size), example(size)
    basis = diagonalize_perturbed(A, E)
    moved = A + E
    assert (rebuilt(basis) - moved).abs().max() <= 1e-9 * norm(moved)
    lengths = torch.linalg.vector_norm(basis.vectors, dim=0)
    assert torch.allclose(lengths, torch.ones_like(lengths))
    imaginary = basis.eigenvalues.imag
    assert (imaginary.diff() <= 0).all()
    assert torch.equal(imaginary, -imaginary.flip(0))  # conjugate pairs


# ---------------------------------------------------------- safe by size


@pytest.mark.parametrize('size', [2, 3, 8, 16, 32, 64])
@pytest.mark.parametrize('length', [0.01, 0.4, 0.49])
def test_every_perturbation_of_a_safe_size_is_stable(size, length):
    """And moves the response by no more than is proven."""
    A, B = hippo_legs(size)
    omega = torch.cat([double([0.0]), torch.logspace(-1, 3, 9).double()])
    exact = hippo_response(size, omega)
    for E in length * random_perturbations(size, 5, seed=1):
        assert spectral_abscissa(A + E) <= -0.5 + length
        moved = state_response(A + E, B, omega)
        deviation = (moved - exact).norm(dim=1).max()
        assert deviation <= length / (0.5 - length)


def test_the_worst_perturbation_is_stable_too():
    """Along the slowest direction of the symmetric part."""
    A = hippo(16)
    _, vectors = torch.linalg.eigh((A + A.mT) / 2)
    slow = vectors[:, -1]
    E = 0.49 * torch.outer(slow, slow)
    assert diagonalize_perturbed(A, E, 0.01).abscissa <= -0.01


def test_an_unsafe_size_is_refused():
    with pytest.raises(ValueError, match=r'at most 0\.49, .* got 0\.5'):
        perturb_then_diagonalize(hippo(8), Perturbation(norm=0.5))
    basis = perturb_then_diagonalize(
        hippo(8), Perturbation(norm=0.5, margin=0.0)
    )
    assert basis.norm == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r'at most -0\.0'):
        perturb_then_diagonalize(double([[0.0, 1], [-1, 0]]))


# ---------------------------------------------------------------- search


def test_random_perturbations():
    E = random_perturbations(8, 3, seed=5)
    assert E.shape == (3, 8, 8)
    assert torch.allclose(torch.linalg.matrix_norm(E, 2), double([1.0] * 3))
    assert torch.equal(E, random_perturbations(8, 3, seed=5))
    assert not torch.equal(E, random_perturbations(8, 3, seed=6))
    assert not torch.equal(E[0], E[1])
    with torch.device('meta'):
        assert random_perturbations(8, 3).device.type == 'cpu'


def test_best_of_the_draws():
    A = hippo(16)
    options = Perturbation(norm=0.3, draws=7, seed=2)
    basis = perturb_then_diagonalize(A, options)
    draws = 0.3 * random_perturbations(16, 7, seed=2)
    conditions = condition_number(torch.linalg.eig(A + draws)[1])
    best = conditions.argmin()
    assert best != 0  # else a single draw would do
    assert torch.equal(basis.perturbation, draws[best])
    assert basis.condition == pytest.approx(conditions[best].item())


def test_only_stable_draws_count():
    """At this size some are unstable, and these have the better bases."""
    A = hippo(8)
    length = 0.1 * norm(A)
    draws = length * random_perturbations(8, 20, seed=0)
    values, vectors = torch.linalg.eig(A + draws)
    unstable = values.real.amax(-1) > -0.01
    assert 0 < unstable.sum() < 20
    assert unstable[condition_number(vectors).argmin()]
    basis = perturb_then_diagonalize(A, Perturbation(relative=0.1))
    assert basis.abscissa <= -0.01
    assert basis.norm == pytest.approx(length)


def test_shifted_if_none_is_stable():
    A = hippo(32)
    basis = perturb_then_diagonalize(
        A, Perturbation(relative=0.1, draws=4, margin=0.05)
    )
    assert basis.abscissa == pytest.approx(-0.05, abs=1e-4)
    assert basis.abscissa <= -0.05
    last = 0.1 * norm(A) * random_perturbations(32, 4)[-1]
    shift = basis.perturbation - last
    assert torch.allclose(shift, shift[0, 0] * torch.eye(32).double())
    assert shift[0, 0] < 0


def test_same_seed_same_bits():
    first, again, other = (
        perturb_then_diagonalize(hippo(8), Perturbation(seed=seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert not torch.equal(first.perturbation, other.perturbation)


def followed(options, size=8, mask=None):
    """A basis, and the steps on the way to it."""
    steps = []
    basis = perturb_then_diagonalize(
        hippo(size), options, mask, lambda *step: steps.append(step)
    )
    return basis, steps


def test_optimization_improves_and_stays_safe():
    options = Perturbation(optimize=True, steps=80)
    basis, steps = followed(options)
    assert [step for step, *_ in steps] == list(range(81))
    start = perturb_then_diagonalize(hippo(8))
    assert steps[0][1] == pytest.approx(start.condition)
    assert basis.condition < start.condition / 2
    lengths = [length for _, _, length, _ in steps]
    assert max(lengths) <= 0.49 * (1 + 1e-9)
    assert lengths[-1] == pytest.approx(0.49)  # it wants to leave
    costs = [math.log(kappa) + length for _, kappa, length, _ in steps]
    assert math.log(basis.condition) + basis.norm == pytest.approx(min(costs))


def test_weight_of_the_size():
    """A larger gamma gives a smaller E and a worse basis."""
    small, large = (
        followed(Perturbation(optimize=True, steps=150, gamma=gamma))[0]
        for gamma in (10.0, 1.0)
    )
    assert small.norm < 0.5 * large.norm
    assert small.condition > large.condition


@pytest.mark.parametrize(
    ('gamma', 'condition', 'relative', 'abscissa'),
    [(1.0, 33.5, 0.0053, -0.77), (5.0, 138, 0.0011, -0.87)],
)
def test_published_optimum(gamma, condition, relative, abscissa):
    """ln kappa + gamma ||E|| for N = 16, 300 steps from 1 % of ||A||."""
    options = Perturbation(relative=0.01, draws=1, optimize=True, gamma=gamma)
    basis, _ = followed(options, size=16)
    assert basis.condition == pytest.approx(condition, rel=0.05)
    assert basis.norm / norm(hippo(16)) == pytest.approx(relative, rel=0.05)
    assert basis.abscissa == pytest.approx(abscissa, abs=0.05)


def test_plain_objective_leaves_the_stable_region():
    """kappa + ||E|| ends unstable for N = 16; the result must not."""
    options = Perturbation(
        relative=0.01, draws=1, optimize=True, objective='plain'
    )
    basis, steps = followed(options, size=16)
    *_, (_, kappa, _, abscissa) = steps
    assert abscissa > 0
    assert kappa == pytest.approx(18.7, rel=0.05)
    assert basis.abscissa <= -0.01
    stable = [kappa for _, kappa, _, alpha in steps if alpha <= -0.01]
    assert min(stable) <= basis.condition < 957  # of the start


@pytest.mark.parametrize('optimize', [False, True])
def test_mask(optimize):
    """Zero outside, and something of everything inside."""
    mask = torch.block_diag(*[torch.ones(2, 2)] * 4).bool()
    options = Perturbation(optimize=optimize, steps=10)
    basis, _ = followed(options, mask=mask)
    assert not basis.perturbation[~mask].any()
    assert basis.perturbation[mask].all()
    if not optimize:
        assert basis.norm == pytest.approx(0.4)


def test_general_matrices():
    """Any stable matrix whose symmetric part is negative."""
    A = detmat(5, 5) - 3 * torch.eye(5).double()
    basis = perturb_then_diagonalize(A, Perturbation(norm=0.2))
    moved = A + basis.perturbation
    assert torch.allclose(rebuilt(basis).real, moved)


# --------------------------------------------------------------- bad input


def test_a_defective_matrix_needs_a_perturbation():
    """LAPACK gives a condition number of 9e15 and no error."""
    jordan = double([[-1.0, 1], [0, -1]])
    with pytest.raises(ValueError, match='no eigenbasis'):
        diagonalize_perturbed(jordan, torch.zeros_like(jordan))
    basis = perturb_then_diagonalize(jordan)
    assert basis.condition < 20


@pytest.mark.parametrize(
    ('matrix', 'message'),
    [
        (torch.zeros(2, 3), r'N, N'),
        (torch.zeros(2, 2, 2), r'real \(N, N\) matrix, got \(2, 2, 2\)'),
        (torch.zeros(2, 2, dtype=torch.complex64), 'want a real'),
        (torch.full((2, 2), math.nan), 'must be finite, got 4'),
    ],
    ids=['not square', 'batch', 'complex', 'NaN'],
)
def test_bad_matrices(matrix, message):
    with pytest.raises(ValueError, match=message):
        perturb_then_diagonalize(matrix)


def test_unstable_sum_is_refused():
    A, E = -torch.eye(2).double(), torch.diag(double([0.995, 0.0]))
    assert diagonalize_perturbed(A, E).abscissa == pytest.approx(-0.005)
    with pytest.raises(ValueError, match=r'at most -0\.01, got -0\.005'):
        diagonalize_perturbed(A, E, 0.01)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        *itertools.product(
            [dict(norm=0.0), dict(norm=math.inf)], ['norm must be positive']
        ),
        (dict(relative=-0.1), 'relative must be positive'),
        (dict(gamma=-1.0), 'gamma must be at least 0'),
        (dict(margin=math.nan), 'margin must be at least 0'),
        (dict(draws=0), 'draws must be at least 1, got 0'),
        (dict(steps=0), 'steps must be at least 1, got 0'),
        (dict(objective='kappa'), r"one of \('log', 'plain'\), got 'kappa'"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Perturbation(**options)
