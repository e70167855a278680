"""Jacobians, tangent kernel, Hessian and the index of known models."""

import math

import pytest
import torch
import torch.nn.functional as F
from stability_oracles import assert_printed, detmat, double
from torch import nn

from mmstabvim import VisionMamba
from mmstabvim.stability import (
    attribution_condition_number,
    evaluated,
    hessian_extremes,
    hessian_product,
    input_jacobian,
    lanczos_extremes,
    largest_gain,
    parameter_jacobian,
    sensitivity_profile,
    singular_values,
    spectral_entropy,
    tangent_kernel,
    typical_gain,
)
from mmstabvim.stability.sensitivity.jacobian import METHODS
from mmstabvim.stability.sensitivity.profile import best_method, input_norms

X = detmat(4, 5, 3)
LABELS = torch.tensor([0, 2, 1, 2])
SQUARES = X.square().sum(1)
# the error of central differences in double precision
ROOM = dict(difference=1e-6, double_backward=1e-9)


def fill(layer, weight, bias):
    layer.weight.data, layer.bias.data = weight, bias
    return layer


@pytest.fixture
def linear():
    """f = W x + b."""
    layer = nn.Linear(5, 3).double()
    return fill(layer, detmat(3, 5, 0), detmat(1, 3, 7)[0])


@pytest.fixture
def perceptron():
    """W2 tanh(W1 x + b1) + b2, 39 parameters."""
    first = fill(nn.Linear(5, 4), detmat(4, 5, 11), detmat(1, 4, 12)[0])
    last = fill(nn.Linear(4, 3), detmat(3, 4, 13), detmat(1, 3, 14)[0])
    return nn.Sequential(first, nn.Tanh(), last)


def profile(model, **options):
    parameters = list(model.parameters())
    return sensitivity_profile(model, X, LABELS, parameters, **options)


# -------------------------------------------------------- a linear model


def test_spectrum_of_a_linear_model(linear):
    jacobian = input_jacobian(linear, X)
    values = singular_values(jacobian)
    printed = [2.1409874801, 1.6874487898, 0.9282095998]
    assert_printed(values, [printed] * 4)
    entropy = spectral_entropy(values)
    assert_printed(entropy, [1.0458158131] * 4)
    assert_printed(spectral_entropy(values, base=2), [1.5087932872] * 4)
    weighted = spectral_entropy(values, power=2)
    assert_printed(weighted, [0.9299992824] * 4)
    condition = attribution_condition_number(values)
    assert_printed(condition, [1.2687718247] * 4)
    typical = jacobian[0].square().sum() / 5
    assert_printed(typical, 1.6585767738)
    bound = values[0, 0].square() * weighted[0].exp() / 5
    assert_printed(bound, 2.3235488503)
    assert typical <= bound


def test_mean_over_unit_vectors_is_the_typical_gain(linear):
    steps = (linear(X[:1] + torch.eye(5)) - linear(X[:1])).square().sum(1)
    assert_printed(steps.mean(), 1.6585767738)


def test_some_rows(linear):
    classes = torch.tensor([[2, 0], [1, 1], [0, 1], [2, 1]])
    found = input_jacobian(linear, X, classes)
    assert_printed(found, linear.weight.detach()[classes])


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('max_classes', [20, 2], ids=['exact', 'lanczos'])
def test_profile_of_a_linear_model(linear, method, max_classes):
    found = profile(linear, method=method, steps=30, max_classes=max_classes)
    room = dict(rtol=ROOM[method], atol=0)
    first = double([2.1409874801] * 4)
    torch.testing.assert_close(found.input_jacobian, first, **room)
    norms = [1.5453624262, 2.1353999313, 2.1419826756, 1.6819402744]
    torch.testing.assert_close(found.parameter_jacobian, double(norms), **room)
    assert_printed((SQUARES + 1).sqrt(), norms)
    assert found.tangent_kernel == pytest.approx(7.3900908299, rel=1e-6)
    kernel = torch.linalg.eigvalsh(X @ X.mT + 1)[-1]
    assert_printed(kernel, 7.3900908299)
    hessians = [0.9171447113, 2.1816075186, 2.2699272284, 0.4223063565]
    torch.testing.assert_close(found.hessian, double(hessians), **room)
    assert found.index() == pytest.approx(7.3900908299, rel=1e-6)
    assert found.finite


@pytest.mark.parametrize('method', METHODS)
def test_hessian_of_the_mean_loss(linear, method):
    found = profile(linear, method=method, loss='mean')
    wanted = double([0.7040925794])
    torch.testing.assert_close(found.hessian, wanted, rtol=1e-6, atol=0)


def test_uniform_probabilities():
    """diag(p) - p p^T has largest eigenvalue 1 / C."""
    layer = nn.Linear(5, 4).double()
    fill(layer, torch.zeros(4, 5).double(), torch.zeros(4).double())
    found = profile(layer, method='double_backward')
    assert_printed(found.hessian, (SQUARES + 1) / 4)
    assert_printed(found.hessian_min, torch.zeros(4).double())
    # no spectrum to speak of
    assert not spectral_entropy(
        singular_values(input_jacobian(layer, X))
    ).any()


def test_multiplicity(linear):
    """Each singular value of the parameter Jacobian as often as classes."""
    jacobian = parameter_jacobian(linear, X, list(linear.parameters()))
    assert jacobian.shape == (4, 3, 18)
    values = singular_values(jacobian)
    assert_printed(values, (SQUARES + 1).sqrt()[:, None].expand(4, 3))


# ----------------------------------------------------------- a perceptron


def test_printed_perceptron(perceptron):
    logits = perceptron(X[:1])[0]
    assert_printed(logits, [2.1649057869, -0.8840205673, -0.4702693147])
    values = singular_values(input_jacobian(perceptron, X))
    assert_printed(values[0], [2.6291617479, 1.3163846530, 0.3251026018])
    largest = [2.6291617479, 2.8075259333, 2.9390195636, 2.7741201223]
    assert_printed(values[:, 0], largest)
    assert_printed(spectral_entropy(values)[0], 0.8574559950)
    assert_printed(spectral_entropy(values, power=2)[0], 0.5603035124)
    assert_printed(attribution_condition_number(values)[0], 1.9972594954)
    jacobian = parameter_jacobian(perceptron, X, list(perceptron.parameters()))
    assert jacobian.shape == (4, 3, 39)
    norms = [2.4031942960, 2.1230725272, 1.7152703941]
    assert_printed(singular_values(jacobian)[0], norms)
    kernel = torch.linalg.eigvalsh(tangent_kernel(jacobian))[-1]
    assert_printed(kernel, 19.1094279333)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('max_classes', [20, 2], ids=['exact', 'lanczos'])
def test_profile_of_a_perceptron(perceptron, method, max_classes):
    found = profile(
        perceptron, method=method, steps=39, max_classes=max_classes
    )
    largest = [2.6291617479, 2.8075259333, 2.9390195636, 2.7741201223]
    room = dict(rtol=ROOM[method], atol=0)
    torch.testing.assert_close(found.input_jacobian, double(largest), **room)
    assert found.parameter_jacobian[0].item() == pytest.approx(
        2.4031942960, rel=ROOM[method]
    )
    assert found.tangent_kernel == pytest.approx(19.1094279333, rel=1e-6)
    assert max(found.errors.values()) < 1e-5


@pytest.mark.parametrize('method', METHODS)
def test_printed_hessian(perceptron, method):
    def loss():
        return F.cross_entropy(perceptron(X[:1]), torch.tensor([1]))

    parameters = list(perceptron.parameters())
    found = hessian_extremes(loss, parameters, method, steps=39)
    room = ROOM[method]
    assert found.largest == pytest.approx(1.4072400500, rel=room)
    assert found.smallest == pytest.approx(-3.3563176249, rel=room)
    assert found.norm == -found.smallest
    assert found.norm_error == found.smallest_error
    product = hessian_product(loss, parameters, method)
    rows = [product(v) for v in torch.eye(39).double()]
    trace = torch.stack(rows).trace().item()
    assert trace == pytest.approx(-4.3030189913, rel=room)


def test_printed_hessian_of_the_mean_loss(perceptron):
    found = profile(
        perceptron, loss='mean', method='double_backward', steps=39
    )
    assert_printed(found.hessian_max, [1.5531224777])
    assert_printed(found.hessian_min, [-0.8308713073])
    assert_printed(found.hessian, [1.5531224777])


def test_single_precision(perceptron):
    """Differences in float32 keep three digits."""
    parameters = list(perceptron.float().parameters())
    found = sensitivity_profile(
        perceptron,
        X.float(),
        LABELS,
        parameters,
        method='difference',
        steps=39,
        max_classes=2,
    )
    assert found.tangent_kernel == pytest.approx(19.1094279333, rel=1e-3)
    wide = sensitivity_profile(
        perceptron.double(),
        X,
        LABELS,
        list(perceptron.parameters()),
        method='double_backward',
        steps=39,
    )
    torch.testing.assert_close(found.hessian, wide.hessian, rtol=2e-3, atol=0)
    first = wide.input_jacobian
    torch.testing.assert_close(found.input_jacobian, first, rtol=1e-3, atol=0)


def test_some_parameters(perceptron):
    """The head alone: its Hessian is that of a linear model."""
    head = list(perceptron[2].parameters())
    found = sensitivity_profile(
        perceptron, X, LABELS, head, method='double_backward'
    )
    features = perceptron[:2](X).detach()
    p = perceptron(X).detach().softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    top = torch.linalg.eigvalsh(inner)[:, -1]
    assert_printed(found.hessian, (features.square().sum(1) + 1) * top)


# ------------------------------------------------------- errors, as stated


@pytest.mark.parametrize('steps', [1, 2, 4, 11])
def test_an_eigenvalue_lies_within_the_error(steps):
    A = detmat(12, 12)
    A = A + A.mT
    values = torch.linalg.eigvalsh(A)
    found = lanczos_extremes(lambda v: A @ v, A[0], steps, seed=2)
    for estimate, error in (
        (found.smallest, found.smallest_error),
        (found.largest, found.largest_error),
    ):
        assert (values - estimate).abs().min() <= error + 1e-12
    assert values[0] - 1e-12 <= found.smallest
    assert found.largest <= values[-1] + 1e-12
    assert found.largest_error > 0


def test_all_steps_are_exact():
    A = detmat(12, 12)
    A = A + A.mT
    values = torch.linalg.eigvalsh(A)
    found = lanczos_extremes(lambda v: A @ v, A[0], 50)
    assert found.smallest == pytest.approx(values[0].item(), rel=1e-12)
    assert found.largest == pytest.approx(values[-1].item(), rel=1e-12)
    assert found.largest_error < 1e-10


def test_error_of_too_few_steps(perceptron):
    few = input_norms(perceptron, X, False, 'double_backward', steps=1)
    exact = input_norms(perceptron, X).values
    assert (few.values <= exact).all()
    assert (few.errors > 0).all()


def test_random_signs_estimate_the_typical_gain(perceptron):
    """Within four standard errors, and less with more draws."""
    jacobian = input_jacobian(perceptron, X)
    exact = jacobian.square().sum((1, 2)) / 5
    few, many = (typical_gain(perceptron, X, n) for n in (16, 400))
    for found in (few, many):
        assert ((found.values - exact).abs() <= 4 * found.errors).all()
    assert (many.errors < few.errors).all()
    assert (many.errors > 0).all()


# --------------------------------------------------------- what is left


@pytest.mark.parametrize('method', METHODS)
def test_nothing_is_left_behind(perceptron, method):
    before = [p.detach().clone() for p in perceptron.parameters()]
    x = X.clone().requires_grad_()
    parameters = list(perceptron.parameters())
    sensitivity_profile(
        perceptron, x, LABELS, parameters, method=method, max_classes=2
    )
    assert x.grad is None
    for old, new in zip(before, parameters, strict=True):
        assert torch.equal(old, new)
        assert new.grad is None
        assert new.requires_grad


def test_modes_come_back():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)).train()
    model[1].eval()
    during = []

    def look():
        with evaluated(model):
            during.extend(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert during == [False] * 3
    assert [m.training for m in model.modules()] == [True, True, False]


def test_a_product_without_second_derivative():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    layer = fill(nn.Linear(5, 3), detmat(3, 5), detmat(1, 3)[0])

    def opaque(x):
        return Opaque.apply(layer(x))

    parameters = list(layer.parameters())
    with pytest.raises(RuntimeError, match='once_differentiable'):
        largest_gain(lambda: opaque(X), parameters, 'double_backward')
    with pytest.raises(RuntimeError, match='once_differentiable'):
        sensitivity_profile(
            opaque, X, LABELS, parameters, method='double_backward'
        )
    found = sensitivity_profile(opaque, X, LABELS, parameters)
    assert found.method == 'difference'
    wanted = sensitivity_profile(
        lambda x: layer(x) ** 2,
        X,
        LABELS,
        parameters,
        method='double_backward',
    )
    torch.testing.assert_close(
        found.hessian, wanted.hessian, rtol=1e-6, atol=0
    )


# ------------------------------------------------------- how, by itself


class Classifier(nn.Module):
    """A Vision Mamba of five tokens and its head."""

    def __init__(self, backend):
        super().__init__()
        self.backbone = VisionMamba(
            dict(embed_dims=8, num_layers=1, d_state=2),
            img_size=8,
            patch_size=4,
            backend=backend,
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.backbone(x)[-1])


def test_fused_scan_against_the_reference():
    """Differences through the one, two derivatives of the other."""
    torch.manual_seed(0)
    fused = Classifier('auto').double().eval()
    plain = Classifier('reference').double().eval()
    plain.load_state_dict(fused.state_dict())
    x, labels = detmat(2, 192, 5).reshape(2, 3, 8, 8), torch.tensor([0, 2])
    found, wanted = (
        sensitivity_profile(m, x, labels, list(m.parameters()), steps=25)
        for m in (fused, plain)
    )
    assert found.method == 'difference'
    assert wanted.method == 'double_backward'
    for name in ('hessian_max', 'hessian_min', 'parameter_jacobian'):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=2e-3, atol=1e-6
        )
    assert found.tangent_kernel == pytest.approx(wanted.tangent_kernel)
    with pytest.raises(RuntimeError, match="use method='difference'"):
        sensitivity_profile(
            fused, x, labels, list(fused.parameters()), method=METHODS[1]
        )


def test_a_kink_is_no_curvature():
    """Units exactly at zero: differences see a bend, derivatives do not."""
    first = fill(nn.Linear(5, 4), detmat(4, 5, 11), double([0] * 4))
    last = fill(nn.Linear(4, 3), detmat(3, 4, 13), detmat(1, 3, 14)[0])
    model = nn.Sequential(first, nn.ReLU(), last)
    x, labels = torch.zeros(1, 5).double(), torch.tensor([1])
    parameters = list(model.parameters())
    found, bent = (
        sensitivity_profile(model, x, labels, parameters, method=m, steps=39)
        for m in ('auto', 'difference')
    )
    p = model(x).detach()[0].softmax(0)
    exact = torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p))[-1]
    # features are zero: what is left is the bias of the head
    assert_printed(found.hessian, exact[None])
    assert found.method == 'double_backward'
    assert bent.hessian > 10 * exact


def test_attention_has_second_derivatives():
    """The fused one has none, so plain operations stand in for it."""
    weight = detmat(12, 4, 7).requires_grad_()

    def attend(x):
        q, k, v = (x @ weight.mT).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.mean(2)[:, 0, :3]

    x = detmat(8, 12, 3).reshape(2, 1, 12, 4)
    found, wanted = (
        sensitivity_profile(
            attend, x, LABELS[:2], [weight], method=m, steps=48, max_classes=2
        )
        for m in ('auto', 'difference')
    )
    assert found.method == 'double_backward'
    torch.testing.assert_close(
        found.hessian, wanted.hessian, rtol=1e-5, atol=1e-8
    )
    torch.testing.assert_close(
        found.input_jacobian, wanted.input_jacobian, rtol=1e-5, atol=1e-8
    )


def test_other_errors_stay(perceptron):
    parameters = list(perceptron.parameters())
    with pytest.raises(RuntimeError, match='must match'):
        best_method(
            lambda x: perceptron(x) + torch.ones(7).double(),
            X,
            LABELS,
            parameters,
        )


@pytest.mark.parametrize(
    ('error', 'method'),
    [
        (torch.OutOfMemoryError('full'), 'difference'),
        (RuntimeError('memory; use method=difference'), None),
    ],
    ids=['memory', 'a message that speaks of it'],
)
def test_kind_of_an_error_decides(perceptron, error, method):
    """Never its text."""

    def failing(x):
        raise error

    def found():
        return best_method(failing, X, LABELS, list(perceptron.parameters()))

    if method:
        assert found() == method
    else:
        with pytest.raises(RuntimeError, match='memory'):
            found()


# -------------------------------------------------------------- the index


def test_index(perceptron):
    found = profile(perceptron, method='double_backward', steps=39)
    four = found.values()
    assert four['input_jacobian'] == found.input_jacobian.max()
    assert found.index(combine='sum') == pytest.approx(sum(four.values()))
    assert found.index() == max(four.values())
    halves = found.values(quantile=0.5, per_sample=True)
    median = found.hessian.quantile(0.5).item()
    assert halves['hessian'] == pytest.approx(median)
    assert halves['tangent_kernel'] == pytest.approx(19.1094279333 / 4)


def test_not_finite(perceptron):
    broken = X.clone()
    broken[2, 0] = math.nan
    parameters = list(perceptron.parameters())
    for classes in (20, 2):
        found = sensitivity_profile(
            perceptron, broken, LABELS, parameters, max_classes=classes
        )
        assert found.index() == math.inf
        assert not found.finite
        assert found.input_jacobian[:2].isfinite().all()
        assert not found.input_jacobian[2].isfinite()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(x=X[:0], labels=LABELS[:0]), 'batch > 0'),
        (dict(labels=LABELS[:3]), r'labels must be \(4,\)'),
        (dict(parameters=[]), 'parameters must be leaf'),
        (dict(parameters=[X]), 'parameters must be leaf'),
        (dict(method='exact'), 'method must be one of'),
        (dict(loss='sum'), 'loss must be one of'),
        (dict(steps=0), 'steps must be at least 1'),
    ],
    ids=['empty', 'labels', 'none', 'frozen', 'method', 'loss', 'steps'],
)
def test_bad_arguments(perceptron, changes, message):
    given = dict(x=X, labels=LABELS, parameters=list(perceptron.parameters()))
    with pytest.raises(ValueError, match=message):
        sensitivity_profile(perceptron, **{**given, **changes})


def test_bad_options(linear):
    with pytest.raises(ValueError, match='combine must be one of'):
        profile(linear).index(combine='mean')
    with pytest.raises(ValueError, match='quantile must be in'):
        profile(linear).index(quantile=95)
    with pytest.raises(ValueError, match='draws must be at least 2'):
        typical_gain(linear, X, draws=1)
    with pytest.raises(ValueError, match='like must be a vector'):
        lanczos_extremes(lambda v: v, X)
    with pytest.raises(ValueError, match='method must be one of'):
        largest_gain(lambda: linear(X), [linear.weight], 'exact')
