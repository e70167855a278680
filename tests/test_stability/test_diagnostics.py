"""Diagnostics of states, steps and gradients."""

import math

import pytest
import torch
from stability_oracles import assert_printed, batch_of, detmat, double

from mmstabvim.stability import (
    count_nonfinite,
    gradient_flow,
    matrix_exponential_scan,
    spectral_abscissa,
    state_bound,
    state_growth,
    step_ranges,
    token_log_gain_bound,
    token_log_gains,
    transient_bounds,
    transient_peak,
)

STEPS = double([0.5, 1, 0.25, 0.1])[None, :, None]
MODES = double([[-1, -2]])


def inputs(batch=2, length=7, dim=3, size=4):
    """Steps, and eigenvalues of both signs."""
    delta = detmat(batch * length, dim).abs().reshape(batch, length, dim)
    return delta, 2 * detmat(dim, size, 3)


def states_of(eigenvalues, delta=0.1, length=197):
    """Powers of exp(delta lambda): (1, length, 1, N)."""
    time = torch.arange(1, length + 1).double()
    return torch.exp(delta * time[:, None] * eigenvalues)[None, :, None]


def test_growth_of_an_unstable_mode():
    """lambda = .5, steps of .1: a factor of 19,000 over an image."""
    states = states_of(double([0.5]))
    growth = state_growth(states)
    assert_printed(growth.slope, [[0.05]])
    last = math.exp(0.5 * 0.1 * 197)
    assert last == pytest.approx(1.896e4, rel=5e-4)
    assert_printed(growth.max_norm, [[last]])
    assert_printed(growth.final_ratio, [[math.exp(0.05 * 98)]])


def test_growth_of_complex_and_decaying_states():
    values = torch.tensor([-0.2 + 3j, -0.2 - 3j], dtype=torch.complex128)
    growth = state_growth(states_of(values))
    assert_printed(growth.slope, [[-0.02]])
    assert growth.final_ratio < 1
    assert growth.max_norm.dtype == torch.float64
    assert_printed(growth.max_norm, [[math.sqrt(2) * math.exp(-0.02)]])


def test_median_is_the_mean_of_the_middle_two():
    norms = double([4, 3, 2, 1])[None, :, None, None]
    assert_printed(state_growth(norms).final_ratio, [[1 / 2.5]])
    norms = double([4, 3, 1])[None, :, None, None]
    assert_printed(state_growth(norms).final_ratio, [[1 / 3]])


def test_slope_leaves_zero_states_out():
    states = states_of(double([0.5]), length=20)
    states[:, :5] = 0
    states[:, 11] = 0
    assert_printed(state_growth(states).slope, [[0.05]])
    for zero in (torch.zeros(2, 5, 3, 4), torch.ones(2, 1, 3, 4)):
        growth = state_growth(zero)
        assert growth.slope.tolist() == [[0.0] * 3] * 2
        assert growth.final_ratio.isfinite().all()


def test_slope_against_least_squares():
    states = detmat(60, 4).reshape(2, 10, 3, 4)
    slope = state_growth(states).slope
    log = states.norm(dim=-1).log()
    time = torch.arange(10).double()
    design = torch.stack((time, torch.ones(10).double()), dim=1)
    solution = torch.linalg.lstsq(design.expand(2, 10, 2), log).solution
    assert_printed(slope, solution[:, 0])


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_state_stays_below_its_bound(b_disc):
    """And a long constant input nearly reaches it."""
    real = double([-0.3, -4.0])
    u = torch.ones(1, 400, 1).double()
    delta = 0.2 * u
    B = double([1, -2]).expand(1, 400, 2)
    A = torch.diag(real)[None]
    _, last = matrix_exponential_scan(u, delta, A, B, B, b_disc=b_disc)
    drive = double([1, 2])
    bound = state_bound(drive, real[None], 0.2, b_disc)
    assert (last[0].abs() <= bound * (1 + 1e-12)).all()
    assert (last[0].abs() >= 0.7 * bound).all()
    wanted = drive * (1 / real.abs() + (0.2 if b_disc == 'euler' else 0))
    assert_printed(bound[0], wanted)


def test_no_bound_for_an_unstable_mode():
    values = torch.tensor([[0.1, 0.0, -1.0 + 5j]], dtype=torch.complex64)
    bound = state_bound(torch.ones(1), values, 0.5)
    assert bound.tolist() == [[math.inf, math.inf, 1.5]]
    assert not state_bound(torch.zeros(1), values, 0.5).any()
    with pytest.raises(ValueError, match=r"b_disc must be one of .*'foh'"):
        state_bound(torch.ones(1), values, 0.5, 'foh')


def test_log_gains():
    gains = token_log_gains(STEPS, MODES)
    printed = [[-1.35, -2.7], [-0.35, -0.7], [-0.1, -0.2], [0, 0]]
    assert_printed(gains[0, :, 0], printed)
    assert (gains[0, -1] == 0).all()


@pytest.mark.parametrize('reverse', [False, True])
def test_log_gains_are_those_of_autograd(reverse):
    """With B = 1 the gradient is the step times the gain."""
    delta = STEPS.flip(1) if reverse else STEPS
    u = torch.ones_like(delta).requires_grad_()
    B = torch.ones(1, 4, 2).double()
    A = torch.diag(MODES[0])[None]
    _, last = matrix_exponential_scan(u, delta, A, B, B, reverse=reverse)
    printed = (
        [0.1296201303, 0.7046880897, 0.2262093545, 0.1],
        [0.0336027564, 0.4965853038, 0.2046826883, 0.1],
    )
    gains = token_log_gains(delta, MODES, reverse)
    for n, wanted in enumerate(printed):
        (grad,) = torch.autograd.grad(last[0, 0, n], u, retain_graph=True)
        grad = grad.flip(1) if reverse else grad
        assert_printed(grad[0, :, 0], wanted)
        by_gain = (delta * gains[..., n].exp())[0, :, 0]
        assert_printed(by_gain.flip(0) if reverse else by_gain, wanted)


def test_log_gain_bound_of_dense_matrices():
    A = batch_of(2, 3)
    X = torch.linalg.eig(A)[1]
    delta, _ = inputs(dim=4)
    bound = token_log_gain_bound(
        delta, spectral_abscissa(A), torch.linalg.cond(X)
    )
    assert bound.shape == delta.shape
    for d in range(4):
        for t in range(7):
            rest = delta[:, t + 1 :, d].sum(1)
            exact = torch.linalg.matrix_exp(rest[:, None, None] * A[d // 2])
            norm = torch.linalg.matrix_norm(exact, 2)
            assert (norm.log() <= bound[:, t, d] + 1e-9).all()
    flipped = token_log_gain_bound(
        delta.flip(1), spectral_abscissa(A), torch.linalg.cond(X), True
    )
    torch.testing.assert_close(flipped.flip(1), bound)


def test_gradient_flow():
    """Modes that vanish, explode and do neither over 100 tokens."""
    delta = torch.full((2, 101, 4), 0.1, dtype=torch.float64)
    real = double([[-3, 1, -0.1, 0]]).repeat(4, 1)
    flow = gradient_flow(delta, real)
    assert flow.vanished == 0.25
    assert flow.exploding == 0.25
    all_real = double([[-3], [1], [-0.1], [0]])
    horizons = gradient_flow(delta, all_real, quantiles=(0, 1 / 3, 2 / 3, 1))
    assert_printed(horizons.horizon[:3], [1 / 0.3, 10, 100])
    assert horizons.horizon[3].isinf()


@pytest.mark.parametrize('reverse', [False, True])
def test_gradient_flow_is_that_of_the_first_token(reverse):
    delta, values = inputs()
    delta[:, 0], delta[:, -1] = 30, 15  # only one of them counts
    values = torch.linspace(-2, 2, 12).double().reshape(3, 4)
    gains = token_log_gains(delta, values, reverse)
    first = gains[:, -1 if reverse else 0]
    flow = gradient_flow(delta, values, reverse)
    assert_printed(flow.vanished, (first < -20).double().mean())
    assert_printed(flow.exploding, (first > 5).double().mean())
    assert 0 < flow.vanished < 1
    assert 0 < flow.exploding < 1
    other = gradient_flow(delta.flip(1), values, not reverse)
    assert_printed(other.vanished, flow.vanished)


def test_transient_of_a_stable_matrix():
    A = double([[-1, 100], [0, -2]])
    time = 0.6928471462
    grid = torch.cat((torch.linspace(0, 4, 401), torch.tensor([time])))
    grid = grid.double()
    grid[-1] = time
    peak, at = transient_peak(A, grid)
    assert_printed(peak, 25.0062509690)
    assert_printed(at, time)
    by_mu, by_alpha = transient_bounds(A, grid)
    norms = torch.stack(
        [
            torch.linalg.matrix_norm(torch.linalg.matrix_exp(t * A), 2)
            for t in grid
        ]
    )
    assert (norms <= by_mu * (1 + 1e-9)).all()
    assert (norms <= by_alpha * (1 + 1e-9)).all()
    assert by_alpha[0].item() == pytest.approx(200.005, abs=5e-4)
    assert (by_mu.log()[-1] / time).item() == pytest.approx(48.5025, abs=5e-5)
    entry = torch.linalg.matrix_exp(math.log(2) * A)[0, 1]
    assert_printed(entry, 25.0)


def test_transients_of_a_batch():
    A = batch_of(6, 3).reshape(2, 3, 3, 3) - 2 * torch.eye(3)
    grid = torch.linspace(0, 2, 21).double()
    peak, at = transient_peak(A.float(), grid)
    assert peak.shape == at.shape == (2, 3)
    assert peak.dtype == torch.float32
    by_mu, by_alpha = transient_bounds(A, grid)
    assert by_mu.shape == by_alpha.shape == (21, 2, 3)
    for i in range(2):
        for j in range(3):
            alone, when = transient_peak(A[i, j], grid)
            torch.testing.assert_close(
                peak[i, j].double(), alone, rtol=1e-5, atol=0
            )
            assert when == pytest.approx(at[i, j].item())
            mu, alpha = transient_bounds(A[i, j], grid)
            assert_printed(by_mu[:, i, j], mu)
            assert_printed(by_alpha[:, i, j], alpha)


@pytest.mark.parametrize('kind', ['stable', 'mixed', 'unstable', 'complex'])
def test_ranges_against_the_whole_product(kind):
    delta, values = inputs()
    if kind in ('stable', 'unstable'):
        values = values.abs() * (-1 if kind == 'stable' else 1)
    if kind == 'complex':
        values = torch.complex(values, detmat(3, 4, 8))
    delta[0, 0, 0] = 5e-5
    found = step_ranges(delta, values)
    product = delta[..., None] * values
    decay = torch.exp(product).abs()
    assert_printed(found.delta_min, 5e-5)
    assert_printed(found.delta_max, delta.amax())
    assert_printed(found.delta_mean, delta.mean())
    assert_printed(found.skipped, 1 / delta.numel())
    assert_printed(found.max_decay_exponent, product.real.abs().amax())
    assert_printed(found.decay_min, decay.amin())
    assert_printed(found.decay_max, decay.amax())
    phase = product.imag.abs().amax() if kind == 'complex' else double(0)
    assert_printed(found.max_phase, phase)


def test_nonfinite_counts():
    tensors = {
        'parameter': torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]),
        'steps': torch.zeros(3, 2),
        'state': torch.tensor([1j, complex(0, torch.nan)]),
        'label': torch.arange(3),
        'none': torch.zeros(0),
    }
    counts = count_nonfinite(tensors)
    assert list(counts) == list(tensors)
    assert [c.item() for c in counts.values()] == [3, 0, 1, 0, 0]
    assert tensors['parameter'].isnan().sum() == 1


def test_half_precision_and_gradients():
    """At least float32, and no gradient is recorded."""
    delta, values = inputs()
    delta = delta.to(torch.bfloat16).requires_grad_()
    values = values.float().requires_grad_()
    results = [
        token_log_gains(delta, values),
        *gradient_flow(delta, values),
        *step_ranges(delta, values),
        *state_growth(values.half().reshape(1, 3, 2, 2)),
    ]
    assert {x.dtype for x in results} == {torch.float32}
    assert not any(x.requires_grad for x in results)


def test_nothing_waits_for_the_device():
    """Tensors without values go through, so no value is looked at."""
    delta = torch.empty(2, 7, 3, device='meta')
    values = torch.empty(3, 4, device='meta')
    results = [
        token_log_gains(delta, values),
        token_log_gain_bound(delta, values[:, 0], values[:, 1]),
        state_bound(values, values, 0.1),
        *gradient_flow(delta, values),
        *step_ranges(delta, values),
        *state_growth(torch.empty(2, 7, 3, 4, device='meta')),
        *count_nonfinite({'delta': delta}).values(),
    ]
    assert {x.device.type for x in results} == {'meta'}


def test_bad_shapes():
    delta, values = inputs()
    for function in (token_log_gains, gradient_flow, step_ranges):
        for args in ((delta[0], values), (delta, values[:2])):
            with pytest.raises(ValueError, match='want delta'):
                function(*args)
    with pytest.raises(ValueError, match='want delta'):
        token_log_gain_bound(delta, values, values)
    with pytest.raises(ValueError, match='groups=2 must divide dim=3'):
        token_log_gain_bound(delta, values[:2, 0], values[:2, 0])
    for states in (torch.zeros(2, 3, 4), torch.zeros(2, 0, 3, 4)):
        with pytest.raises(ValueError, match='states must be'):
            state_growth(states)
    for function in (transient_peak, transient_bounds):
        for times in (torch.zeros(0), torch.zeros(1, 1)):
            with pytest.raises(ValueError, match='times must be'):
                function(values[:3, :3], times)
        with pytest.raises(ValueError, match=r'^A must be finite'):
            function(values[:3, :3] / 0, torch.ones(1))
