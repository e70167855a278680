"""Losses on Jacobians and norms: values, gradients, and in training."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mmstabvim
from mmstabvim.models.losses import input_loss
from mmstabvim.stability import (
    find_layers,
    input_jacobian,
    layer_norms,
    parametrize_norm,
    singular_values,
    spectral_entropy,
)
from mmstabvim.stability.sensitivity.regularization import (
    entropy_penalty,
    jacobian_penalty,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_runs import digits_config, scalars, train

METHODS = ['difference', 'double_backward']


@pytest.fixture
def model():
    """Six inputs, three logits, dropout in between."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.9), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 6, generator=generator, dtype=torch.float64)


def gradients(penalty, model):
    return torch.autograd.grad(penalty, list(model.parameters())[:3])


def slopes(compute, model):
    """Central differences along each of three weights."""
    found = []
    for parameter in list(model.parameters())[:3]:
        view = parameter.data.view(-1)[:1]
        view += 1e-5
        ahead = compute().item()
        view -= 2e-5
        found.append((ahead - compute().item()) / 2e-5)
        view += 1e-5
    return found


# ------------------------------------------------------------ the penalties


@pytest.mark.parametrize('method', METHODS)
def test_projections_average_to_the_frobenius_norm(model, x, method):
    """Each draw differs; 3,000 of them come within 3 %."""
    model.eval()
    many = x[:1].expand(3000, 6)
    generator = torch.Generator().manual_seed(0)
    found = jacobian_penalty(model, many, method, generator).item()
    wanted = input_jacobian(model, x[:1]).square().sum().item()
    assert found == pytest.approx(wanted, rel=0.03)
    other = jacobian_penalty(model, many, method, generator).item()
    assert other != found


@pytest.mark.parametrize('method', METHODS)
def test_gradient_of_the_jacobian_penalty(model, x, method):
    model.eval()

    def compute():
        generator = torch.Generator().manual_seed(3)
        return jacobian_penalty(model, x, method, generator)

    found = [g.view(-1)[0].item() for g in gradients(compute(), model)]
    assert found == pytest.approx(slopes(compute, model), rel=1e-5)
    assert min(map(abs, found)) > 1e-4


@pytest.mark.parametrize('power', [1.0, 2.0])
@pytest.mark.parametrize('method', METHODS)
def test_entropy_penalty(model, x, method, power):
    """The value is exact; so is the gradient, up to differences."""
    model.eval()

    def compute():
        return entropy_penalty(model, x, power, method)

    values = singular_values(input_jacobian(model, x))
    entropy = spectral_entropy(values, power).mean().item()
    penalty = compute()
    assert penalty.item() == pytest.approx(math.log(3) - entropy)
    found = [g.view(-1)[0].item() for g in gradients(penalty, model)]
    assert found == pytest.approx(slopes(compute, model), rel=1e-4)
    assert min(map(abs, found)) > 1e-4


def test_equal_singular_values_are_free():
    model = nn.Linear(3, 3)
    model.weight.data = 2 * torch.eye(3)
    penalty = entropy_penalty(model, torch.ones(2, 3))
    assert penalty.item() == pytest.approx(0, abs=1e-6)


def test_descent_of_the_entropy_penalty(model, x):
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    penalties = []
    for _ in range(40):
        penalty = entropy_penalty(model, x)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties[-1] < 0.5 * penalties[0]


def test_zeros_have_a_step():
    """Images of zeros, and a Jacobian that is zero."""
    model = nn.Linear(4, 2)
    x = torch.zeros(3, 4)
    assert jacobian_penalty(model, x) > 0
    model.weight.data.zero_()
    assert jacobian_penalty(model, x) == 0
    penalty = entropy_penalty(model, x)
    penalty.backward()
    assert penalty.item() == pytest.approx(math.log(2))
    assert model.weight.grad.isfinite().all()


# --------------------------------------------------------------- the losses


@pytest.mark.parametrize(
    'loss', [mmstabvim.JacobianLoss, mmstabvim.EntropyLoss]
)
def test_loss_sees_the_model_in_evaluation(loss, model, x):
    """No dropout, the first images only, the weight as a factor."""
    model.float().train()
    one, ten = (
        loss(loss_weight=w, samples=2)(model, x).item() for w in (1, 10)
    )
    assert ten == pytest.approx(10 * one)
    assert all(m.training for m in model.modules())
    more = torch.cat([x[:2], 5 + x[2:]])
    assert loss(loss_weight=1, samples=2)(model, more).item() == one
    assert loss(loss_weight=1, samples=3)(model, more).item() != one
    with torch.autocast('cpu', torch.bfloat16):
        assert loss(loss_weight=1, samples=2)(model, x).item() == one


def test_directions_change_and_repeat(model, x, monkeypatch):
    model.float()
    first, again = mmstabvim.JacobianLoss(), mmstabvim.JacobianLoss()
    rng = torch.get_rng_state()
    values = [first(model, x).item() for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), rng)
    assert len(set(values)) == 3
    again.load_state_dict(first.state_dict())
    assert again(model, x).item() == first(model, x).item()
    other = mmstabvim.JacobianLoss(seed=1)
    assert other(model, x).item() != values[0]
    monkeypatch.setattr(input_loss, 'get_rank', lambda: 1)
    second = mmstabvim.JacobianLoss()
    assert second(model, x).item() != values[0]


def test_spectral_constraint(model):
    layers = find_layers(model, ['*'])
    norms = layer_norms(layers)
    bound = min(norms.values()) * 0.9
    loss = mmstabvim.SpectralConstraintLoss(
        ['*'], bound, loss_weight=3, steps=30
    )
    penalty = loss(model)
    wanted = 3 * sum((n - bound) ** 2 for n in norms.values())
    assert penalty.item() == pytest.approx(wanted, rel=1e-5)
    weight = model[0].weight
    (found,) = torch.autograd.grad(penalty, weight)
    U, S, V = torch.linalg.svd(weight.detach())
    gradient = 6 * (S[0] - bound) * torch.outer(U[:, 0], V[0])
    torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4)
    high = mmstabvim.SpectralConstraintLoss(['*'], 2 * max(norms.values()))
    assert high(model) == 0
    (none,) = torch.autograd.grad(high(model), weight)
    assert not none.any()


def test_norms_of_convolutions():
    """The bounds that other hooks use, with gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Conv2d(3, 5, 3))
    loss = mmstabvim.SpectralConstraintLoss(['*'], 1e-3, steps=50)
    norms = loss.norms(model)
    found = {names[0]: value.item() for names, value in norms.items()}
    wanted = layer_norms(find_layers(model, ['*']))
    assert found == pytest.approx(wanted, rel=1e-5)
    loss(model).backward()
    assert all(layer.weight.grad.any() for layer in model)


def test_norm_of_a_parametrized_weight(model):
    """The weight that the layer computes with; no step of its own."""
    layer = model.float().train()[0]
    parametrize_norm(layer, 'divide', max_norm=2.0, steps=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss = mmstabvim.SpectralConstraintLoss(['0'], 1.0, 1.0, steps=20)
    penalty = loss(model)
    assert penalty.item() == pytest.approx(1, rel=1e-3)
    original = layer.parametrizations.weight.original
    assert torch.autograd.grad(penalty, original)[0].isfinite().all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert parametrize.is_parametrized(layer)


def test_vectors_go_on(model):
    first = mmstabvim.SpectralConstraintLoss(['*'], 0.1)
    exact = sum(
        (n - 0.1) ** 2 for n in layer_norms(find_layers(model, ['*'])).values()
    )
    values = [first(model).item() for _ in range(4)]
    # not from the first vector, but from some steps on
    assert values[0] == pytest.approx(0.01 * exact, rel=0.01)
    again = mmstabvim.SpectralConstraintLoss(['*'], 0.1)
    again.load_state_dict(first.state_dict())
    assert again(model).item() == first(model).item()
    assert values == sorted(values)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('JacobianLoss', dict(loss_weight=-1), 'loss_weight must be at'),
        ('JacobianLoss', dict(samples=0), 'samples must be at least 1'),
        ('EntropyLoss', dict(method='exact'), 'method must be one of'),
        ('EntropyLoss', dict(power=0), 'power must be positive'),
        ('SpectralConstraintLoss', dict(max_norm=0), 'max_norm must be'),
        ('SpectralConstraintLoss', dict(steps=0), 'steps must be at'),
        ('SpectralConstraintLoss', dict(loss_weight=-1), 'loss_weight'),
    ],
    ids=['weight', 'samples', 'method', 'power', 'norm', 'steps', 'factor'],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(mmstabvim, name)(**options)


def test_bad_models(model, x):
    with pytest.raises(TypeError, match='inputs must be a tensor, got list'):
        mmstabvim.JacobianLoss()(model, [x])
    pair = nn.LSTM(6, 2)
    with pytest.raises(TypeError, match='one tensor of logits, got tuple'):
        mmstabvim.JacobianLoss()(pair, x)
    with pytest.raises(ValueError, match='matches no linear'):
        mmstabvim.SpectralConstraintLoss(['conv'])(model)


# ------------------------------------------------------------- in training


def hook(name, **options):
    loss = dict(type=f'mmstabvim.{name}', **options)
    return dict(type='mmstabvim.StabilityLossHook', loss=loss)


def three():
    return [
        hook('JacobianLoss', loss_weight=1e-3, samples=4),
        hook('SpectralConstraintLoss', max_norm=0.5),
        hook('EntropyLoss', samples=2),
        dict(type='mmstabvim.StabilityLossHook', eps=-2.0, reduction='mean'),
        dict(type='mmstabvim.RandomStateHook'),
    ]


def small(tmp_path, hooks, epochs=2):
    cfg = digits_config(tmp_path)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.indices = 16
        cfg[f'{split}_dataloader'].batch_size = 8
    cfg.train_cfg.update(max_epochs=epochs, val_interval=9)
    cfg.param_scheduler = []
    cfg.custom_hooks = hooks
    return cfg


def test_four_losses_together_and_resumed(tmp_path):
    """They are logged and summed; resuming repeats them bit by bit."""
    cfg = small(tmp_path / 'whole', three())
    whole = train(cfg)
    keys = ['jacobian', 'spectral_norm', 'entropy', 'stab']
    logged = [scalars(cfg, f'loss_{key}') for key in keys]
    assert all(len(values) == 4 for values in logged)
    assert all(v > 0 for values in logged for v in values.values())
    total = scalars(cfg, 'loss')
    parts = [sum(values[step] for values in logged) for step in total]
    assert all(
        whole > part for whole, part in zip(total.values(), parts, strict=True)
    )
    file = torch.load(tmp_path / 'whole/work/epoch_1.pth', weights_only=False)
    states = file['stability_losses']
    assert set(states) == {
        'loss_jacobian',
        'loss_spectral_norm',
        'loss_entropy',
    }
    assert states['loss_jacobian']['_extra_state'] == {'count': 2}
    rest = small(tmp_path / 'rest', three())
    rest.resume = True
    rest.load_from = str(tmp_path / 'whole/work/epoch_1.pth')
    again = train(rest)
    for key in (*keys, None):
        name = f'loss_{key}' if key else 'loss'
        old, new = scalars(cfg, name), scalars(rest, name)
        assert new == {step: old[step] for step in (3, 4)}, name
    weights = again.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_other_randomness_stays(tmp_path):
    """With weight 0 a penalty leaves the training as it is, bit by bit."""
    runs = []
    for name, hooks in (
        ('plain', []),
        ('with', [hook('JacobianLoss', loss_weight=0.0)]),
    ):
        cfg = small(tmp_path / name, hooks, epochs=1)
        runs.append(train(cfg).model.state_dict())
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_hook_refuses_both():
    from mmstabvim import StabilityLossHook

    with pytest.raises(ValueError, match=r"belong into loss=dict.*'eps'"):
        StabilityLossHook(loss=dict(type='mmstabvim.JacobianLoss'), eps=0.1)
    module = mmstabvim.JacobianLoss()
    assert StabilityLossHook(loss=module).loss is module
    assert StabilityLossHook(eps=0.1).key == 'loss_stab'
