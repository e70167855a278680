"""Norms of matrices and convolutions, against closed forms and operators."""

import math

import pytest
import torch
from stability_oracles import assert_printed, detmat, double
from torch import nn
from weight_checks import causal_norm, operator_matrix, top

from mmstabvim.stability import (
    conv_norm_bound,
    local_jacobian_norm,
    overlap_factor,
    power_iteration,
    scan_gain_bound,
    spectral_norm,
)
from mmstabvim.stability.weights.layers import project_norms_

W = detmat(5, 7)
SIGMA = 2.6052079918
TAPS = double([0.25, -0.5, 0.75, 1.0])
PATCHES = detmat(6, 12).reshape(6, 3, 2, 2)


# ----------------------------------------------------------------- matrices


def test_spectral_norm_of_the_example():
    assert_printed(spectral_norm(W), SIGMA)
    others = [2.2371746020, 1.7511965526, 1.1754900449, 0.7314632107]
    assert_printed(torch.linalg.svdvals(W), [SIGMA, *others])
    batch = spectral_norm(torch.stack([W, 2 * W, 0 * W]))
    assert_printed(batch, double([SIGMA, 2 * SIGMA, 0]))


def test_power_iteration_of_the_example():
    u = torch.full((5,), 5**-0.5, dtype=torch.float64)
    wanted = {1: 1.4903588, 5: 2.5977095, 10: 2.6048513, 20: 2.6052072}
    for steps, value in wanted.items():
        found = power_iteration(W, u, steps)
        assert found.sigma.item() == pytest.approx(value, abs=5e-8)
        assert found.sigma <= spectral_norm(W)
        torch.testing.assert_close(found.u @ W @ found.v, found.sigma)
    # in parts as in one go
    parts = power_iteration(W, power_iteration(W, u, 4).u, 6)
    torch.testing.assert_close(parts.sigma, power_iteration(W, u, 10).sigma)


def test_power_iteration_of_zeros_keeps_its_vector():
    u = torch.tensor([0.6, 0.8])
    found = power_iteration(torch.zeros(2, 3), u, 3)
    assert found.sigma == 0
    assert torch.equal(found.u, u)
    assert power_iteration(torch.eye(2), found.u).sigma == 1


def test_power_iteration_does_not_hide_nan():
    matrix = torch.eye(3)
    matrix[1, 2] = math.nan
    assert power_iteration(matrix, torch.full((3,), 3**-0.5)).sigma.isnan()


def test_spectral_norm_is_differentiable():
    assert torch.autograd.gradcheck(spectral_norm, W.clone().requires_grad_())


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: spectral_norm(torch.ones(3)), r'\(\.\.\., m, n\)'),
        (lambda: spectral_norm(W * math.inf), 'W must be finite'),
        (lambda: power_iteration(W, W[0]), r'u must be \(5,\)'),
        (lambda: power_iteration(W, W[:, 0], 0), 'steps must be at least 1'),
        (lambda: conv_norm_bound(TAPS, 15), 'at least 4 q = 16, got 15'),
        (lambda: conv_norm_bound(TAPS[:0]), 'q > 0'),
        (lambda: project_norms_([], {}, 'learned'), 'rule must be one of'),
        (lambda: scan_gain_bound(W, W[:, 0], W, W), 'negative everywhere'),
        (
            lambda: scan_gain_bound(-W.abs(), 0 * W[:, 0], W, W),
            'delta must be positive',
        ),
        (
            lambda: local_jacobian_norm(lambda x: x[:1], W),
            'must keep the batch of 5',
        ),
        (lambda: local_jacobian_norm(torch.sin, W, 0), 'steps must be'),
        (
            lambda: local_jacobian_norm(torch.sin, W, method='svd'),
            'method must be one of',
        ),
    ],
    ids=range(12),
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------- convolutions along a sequence


def test_bound_for_any_length():
    """The supremum over all frequencies is 1.625."""
    bound = conv_norm_bound(TAPS, 256)
    assert_printed(bound, 1.6255093441)
    assert torch.equal(conv_norm_bound(TAPS), bound)  # 64 per tap
    fine = torch.fft.rfft(TAPS, 1 << 16).abs().amax().item()
    assert fine == pytest.approx(1.625, abs=1e-8)
    assert conv_norm_bound(double([-3.0])).item() == 3  # one tap: exact


@pytest.mark.parametrize(
    ('length', 'norm'),
    [
        (4, 1.4720372954),
        (8, 1.5588152969),
        (14, 1.5968851700),
        (197, 1.6248021435),
    ],
)
def test_causal_convolution_tends_to_its_bound(length, norm):
    found = causal_norm(TAPS, length)
    assert_printed(found, norm)
    assert found <= conv_norm_bound(TAPS)


def test_bound_holds_for_random_kernels():
    """And is tight: for the longest one within a few percent."""
    generator = torch.Generator().manual_seed(0)
    taps = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    bound = conv_norm_bound(taps)
    assert bound.shape == (50,)
    for length in (1, 3, 5, 65):
        found = torch.stack([causal_norm(one, length) for one in taps])
        assert (found <= bound).all()
    assert (found > 0.97 * bound).all()
    few = conv_norm_bound(taps, 16)
    assert (few >= conv_norm_bound(taps, 4096)).all()
    assert (few > bound).any()


def test_convolution_bound_is_differentiable():
    taps = torch.stack([TAPS, detmat(1, 4, 5)[0]]).requires_grad_()
    assert torch.autograd.gradcheck(conv_norm_bound, taps)


def test_no_gradient_where_a_kernel_is_zero():
    taps = torch.zeros(2, 4, requires_grad=True)
    norms = conv_norm_bound(taps)
    norms.sum().backward()
    assert not norms.any()
    assert torch.equal(taps.grad, torch.zeros(2, 4))


# ----------------------------------------------- convolutions of an image


def test_patches_that_do_not_overlap_are_a_matrix():
    assert_printed(spectral_norm(PATCHES.flatten(1)), 3.1611402251)
    assert overlap_factor([2, 2], [2, 2]) == 1
    matrix = operator_matrix(
        lambda x: nn.functional.conv2d(x, PATCHES, stride=2), 3, 6, 6
    )
    assert_printed(top(matrix), 3.1611402251)


def test_overlapping_patches_have_a_bound():
    bound = overlap_factor([2, 2], [1, 1]) * spectral_norm(PATCHES.flatten(1))
    assert_printed(bound, 6.3222804502)
    matrix = operator_matrix(
        lambda x: nn.functional.conv2d(x, PATCHES), 3, 6, 6
    )
    assert_printed(top(matrix), 4.9269088252)
    assert top(matrix) <= bound


@pytest.mark.parametrize(
    ('kernel', 'stride', 'dilation', 'patches'),
    [
        ([4], [2], [1], 2),
        ([4], [3], [1], 2),
        ([3], [2], [2], 3),  # every tap lands on the same grid
        ([3], [2], [3], 2),
        ([16, 16], [8, 16], [1, 1], 2),
        ([2], [5], [1], 1),
    ],
    ids=str,
)
def test_overlap_factor(kernel, stride, dilation, patches):
    """Counted: how often a kernel of ones reads the most read value."""
    assert overlap_factor(kernel, stride, dilation) == math.sqrt(patches)
    if len(kernel) == 1:
        ones = torch.ones(1, 1, 40, requires_grad=True)
        nn.functional.conv1d(
            ones, torch.ones(1, 1, *kernel), None, stride, 0, dilation
        ).sum().backward()
        assert ones.grad.max() == patches


# ------------------------------------------------------- scan and Jacobian


@pytest.mark.parametrize(
    ('A', 'delta', 'gain'),
    [(-1.0, 0.1, 1.0508331945), (-16.0, 0.1, 0.1252970351)],
)
def test_gain_of_one_mode(A, delta, gain):
    one = double([[1.0]])
    args = double([[A]]), double([delta]), one, one
    assert_printed(scan_gain_bound(*args), double([gain]))
    assert scan_gain_bound(*args) <= 1 / abs(A) + delta
    assert_printed(scan_gain_bound(*args, b_disc='zoh'), double([1 / -A]))


@pytest.mark.parametrize('b_disc', ['euler', 'zoh'])
def test_scan_obeys_its_gain(b_disc):
    """The norm of the matrix from inputs to outputs, 60 tokens."""
    A, delta, D = double([-1.0, -2.0]), 0.1, 0.5
    B, C = double([1.0, -0.7]), double([1.0, -0.5])
    drive = delta if b_disc == 'euler' else torch.expm1(delta * A) / A
    lag = torch.arange(60).double()
    kernel = ((lag[:, None] * delta * A).exp() * drive * B * C).sum(1)
    index = torch.arange(60)[:, None] - torch.arange(60)
    matrix = kernel[index.clamp(min=0)] * (index >= 0)
    matrix += D * torch.eye(60, dtype=torch.float64)
    bound = scan_gain_bound(
        A[None], double([delta]), B, C, double([D]), b_disc
    )
    assert top(matrix) <= bound
    assert top(matrix) > 0.6 * bound
    # modes of opposite signs might cancel, or not
    opposite = B * double([1.0, -1.0])
    again = scan_gain_bound(
        A[None], double([delta]), opposite, C, double([-D]), b_disc
    )
    assert torch.equal(again, bound)


X = detmat(4, 5, 3)


def network(x):
    """5 to 3 with one hidden layer of tanh."""
    hidden = torch.tanh(x @ detmat(4, 5, 11).T + detmat(1, 4, 12))
    return hidden @ detmat(3, 4, 13).T + detmat(1, 3, 14)


@pytest.mark.parametrize('method', ['double_backward', 'difference'])
def test_local_jacobian_norm(method):
    assert_printed(
        network(X)[0], double([2.1649057869, -0.8840205673, -0.4702693147])
    )
    wanted = double([2.6291617479, 2.8075259333, 2.9390195636, 2.7741201223])
    found = local_jacobian_norm(network, X, 60, method)
    accuracy = 1e-9 if method == 'double_backward' else 1e-6
    torch.testing.assert_close(found, wanted, rtol=accuracy, atol=0)
    few = local_jacobian_norm(network, X, 2)
    assert (few < wanted).all()
    assert (few > 0.5 * wanted).all()


def test_jacobian_of_a_linear_map_in_float32():
    weight = detmat(3, 5).float()
    for method in ('double_backward', 'difference'):
        found = local_jacobian_norm(
            lambda x: (x.flatten(1) @ weight.T)[:, :, None],
            torch.zeros(2, 5, 1),
            40,
            method,
        )
        wanted = spectral_norm(weight).expand(2)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
