"""Entropy, condition number, attributions and their distance."""

import math

import pytest
import torch
from stability_oracles import assert_printed, detmat, double

from mmstabvim.stability import (
    attribution_condition_number,
    attribution_instability,
    attributions,
    effective_rank,
    frechet_distance,
    gaussian_changes,
    prepare_attributions,
    spectral_entropy,
)
from mmstabvim.stability.sensitivity.attribution import predicted_classes


def rotation(size, tag=0):
    return torch.linalg.qr(detmat(size, size, tag)).Q


def perceptron():
    """W2 tanh(W1 x + b1) + b2 on rows of x, with printed numbers."""
    W1, b1, W2, b2 = weights()
    return lambda x: torch.tanh(x @ W1.mT + b1) @ W2.mT + b2


def weights():
    shapes = [(4, 5, 11), (1, 4, 12), (3, 4, 13), (1, 3, 14)]
    W1, b1, W2, b2 = (detmat(*shape) for shape in shapes)
    return W1, b1[0], W2, b2[0]


# ------------------------------------------------------------ the spectrum


def test_entropy_of_four():
    values = double([4, 3, 2, 1])
    assert_printed(spectral_entropy(values), 1.2798542258)
    assert_printed(spectral_entropy(values, power=2), 1.0784767751)
    assert_printed(effective_rank(values), math.exp(1.2798542258))


@pytest.mark.parametrize('power', [1, 2])
def test_entropy_at_the_ends(power):
    values = double([[0, 0, 0], [5, 0, 0], [2, 2, 2], [1e200, 1e200, 1e200]])
    found = spectral_entropy(values, power=power)
    assert_printed(found, [0, 0, math.log(3), math.log(3)])


@pytest.mark.parametrize('power', [1, 2])
def test_entropy_does_not_see_the_scale(power):
    values = detmat(6, 5).abs()
    found = spectral_entropy(values, power)
    assert_printed(spectral_entropy(7e-3 * values, power), found)
    assert (found > 0).all()
    assert (found < math.log(5)).all()


def test_entropy_is_at_least_that_of_the_stable_rank():
    values = torch.linalg.svdvals(detmat(5, 7))
    stable_rank = values.square().sum() / values[0].square()
    assert stable_rank <= effective_rank(values, power=2)


def test_gradient_of_the_entropy():
    values = double([3, 2, 0.5]).requires_grad_()
    for power in (1, 2):
        assert torch.autograd.gradcheck(
            lambda v, a=power: spectral_entropy(v, a), values
        )
    zero = double([1, 0]).requires_grad_()
    spectral_entropy(zero).backward()
    assert zero.grad.isfinite().all()


def test_condition_number():
    rows = double([[4, 3, 2, 1], [1, 2, 4, 3], [1, 1, 1, 5]])
    assert_printed(attribution_condition_number(rows), [1.6, 1.6, 5])
    assert_printed(attribution_condition_number(double([0.3])), 1)
    assert attribution_condition_number(double([1, 0, 0])) == math.inf
    assert attribution_condition_number(double([2, math.nan])).isnan()


@pytest.mark.parametrize('scale', [1e-4, 30])
def test_invariance(scale):
    """Orthogonal changes of both sides, and the scale, change nothing."""
    A = detmat(3, 5)
    values = torch.linalg.svdvals(A)
    turned = scale * rotation(3) @ A @ rotation(5, 4)
    others = torch.linalg.svdvals(turned)
    for function in (spectral_entropy, attribution_condition_number):
        assert_printed(function(others), function(values))


@pytest.mark.parametrize(
    ('function', 'arguments', 'message'),
    [
        (spectral_entropy, (torch.zeros(2, 0),), 'count > 0'),
        (spectral_entropy, (torch.ones(2), 0), 'power must be positive'),
        (spectral_entropy, (torch.ones(2), 1, 1), 'base must be larger'),
        (attribution_condition_number, (torch.zeros(0),), 'count > 0'),
    ],
    ids=['empty', 'power', 'base', 'empty condition'],
)
def test_bad_spectrum(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# ------------------------------------------------------------ attributions


def test_attributions_of_a_linear_model():
    W, x = detmat(3, 5), detmat(4, 5, 3)
    classes = torch.tensor([0, 2, 1, 2])

    def linear(x):
        return x @ W.mT

    chosen = W[classes]
    assert_printed(attributions(linear, x, classes), chosen)
    for method in ('gradient_x_input', 'integrated'):
        found = attributions(linear, x, classes, method)
        assert_printed(found, chosen * x)
    assert not attribution_instability(linear, x, classes=classes).any()


def test_integrated_gradients_are_complete():
    """They sum to the change of the logit from an input of zeros."""
    function, x = perceptron(), detmat(4, 5, 3)
    classes = predicted_classes(function, x)
    found = attributions(function, x, None, 'integrated', steps=400)
    change = function(x) - function(torch.zeros_like(x))
    change = change.gather(1, classes[:, None])[:, 0]
    assert torch.allclose(found.sum(1), change, atol=1e-4)


def test_printed_instability():
    function, x = perceptron(), detmat(4, 5, 3)
    changes = 0.1 * detmat(4, 5, 21)[None]
    classes = torch.zeros(4, dtype=torch.int64)
    found = attribution_instability(function, x, changes, classes)
    wanted = [0.2438334267, 0.0625185821, 0.0654295684, 0.1468193275]
    assert_printed(found, wanted)


def test_instability_is_the_mean_over_changes():
    function, x = perceptron(), detmat(4, 5, 3)
    changes = gaussian_changes(x, std=0.3, draws=3, seed=5)
    each = [attribution_instability(function, x, c[None]) for c in changes]
    found = attribution_instability(function, x, changes)
    assert_printed(found, torch.stack(each).mean(0))


def test_the_class_stays_that_of_the_clean_input():
    """A change that flips the prediction compares the same logit."""
    W = double([[1, 0], [0, 2]])

    def linear(x):
        return x @ W.mT

    x = double([[1, 0.4]])
    changes = double([[[0, 1]]])
    assert linear(x).argmax() != linear(x + changes[0]).argmax()
    assert attribution_instability(linear, x, changes) == 0


def test_random_changes_repeat():
    x = torch.zeros(2, 300)
    found = gaussian_changes(x, std=0.5, draws=2, seed=1)
    assert torch.equal(found, gaussian_changes(x, 0.5, 2, 1))
    assert not torch.equal(found, gaussian_changes(x, 0.5, 2, 2))
    assert found.std().item() == pytest.approx(0.5, rel=0.1)


def test_attributions_leave_no_gradient_behind():
    model = torch.nn.Linear(5, 3)
    x = torch.ones(2, 5, requires_grad=True)
    found = attributions(model, x)
    assert not found.requires_grad
    assert x.grad is None
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(method='saliency'), 'method must be one of'),
        (dict(steps=0), 'steps must be at least 1'),
    ],
    ids=['method', 'steps'],
)
def test_bad_attributions(options, message):
    with pytest.raises(ValueError, match=message):
        attributions(perceptron(), detmat(4, 5), **options)


def test_not_logits():
    with pytest.raises(ValueError, match=r'logits \(4, classes\)'):
        attributions(lambda x: x.sum(1), detmat(4, 5))
    with pytest.raises(ValueError, match='got tuple'):
        attributions(lambda x: (x,), detmat(4, 5))
    with pytest.raises(ValueError, match='changes must be'):
        attribution_instability(perceptron(), detmat(4, 5), detmat(4, 5))


# ------------------------------------------------------------ the distance


def test_printed_distances():
    a = detmat(6, 3, 0)
    assert_printed(frechet_distance(a, detmat(6, 3, 9)), 2.0297787963)
    assert_printed(frechet_distance(a, a), 0)
    shifted = a + double([1, 2, 2])
    assert_printed(frechet_distance(a, shifted), 9)
    wide = frechet_distance(detmat(8, 200, 1), detmat(10, 200, 2))
    assert_printed(wide, 114.7559666466)


def test_distance_to_twice_itself():
    """tr S + tr 4S - 2 tr 2S = tr S."""
    centred = detmat(6, 3) - detmat(6, 3).mean(0)
    found = frechet_distance(centred, 2 * centred)
    assert_printed(found, 1.2486376166)


def test_root_of_covariances():
    """sqrt(8 + 2 * 3) for [[2, 1], [1, 2]] and diag(1, 3)."""

    def vectors(covariance):
        root = torch.linalg.cholesky(covariance).mT
        return torch.cat([root, -root])  # four vectors, divisor 3

    first, second = double([[2, 1], [1, 2]]), double([[1, 0], [0, 3]])
    trace = 4 + 4 - 2 * 3.7416573868
    found = frechet_distance(vectors(first), vectors(second))
    assert_printed(found * 3 / 2, trace)


def test_distance_does_not_see_rotations():
    a, b, Q = detmat(6, 4), detmat(5, 4, 3), rotation(4)
    assert_printed(frechet_distance(a @ Q, b @ Q), frechet_distance(a, b))
    assert_printed(frechet_distance(b, a), frechet_distance(a, b))


@pytest.mark.parametrize(
    ('first', 'second', 'message'),
    [
        (torch.ones(1, 3), torch.ones(4, 3), 'first must be'),
        (torch.ones(4, 3), torch.ones(3), 'second must be'),
        (torch.ones(4, 3), torch.ones(4, 2), 'sizes differ'),
        (torch.full((4, 3), math.inf), torch.ones(4, 3), 'first must be fin'),
    ],
    ids=['one', 'vector', 'sizes', 'infinite'],
)
def test_bad_sets(first, second, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(first, second)


def test_pooled_unit_attributions():
    values = detmat(2, 48).reshape(2, 3, 4, 4)
    pooled = prepare_attributions(values, pool=2)
    assert pooled.shape == (2, 12)
    assert_printed(pooled[0, 0], values[0, 0, :2, :2].mean().item())
    values[1] = 0
    sizes = prepare_attributions(values, unit=True).norm(dim=1)
    assert_printed(sizes, [1, 0])
    with pytest.raises(ValueError, match='pool must be positive'):
        prepare_attributions(values.flatten(1), pool=2)
