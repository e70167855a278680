"""Parametrized weights: the rule, its gradient, states; and PyTorch's own."""

import copy

import pytest
import torch
from stability_oracles import detmat
from torch import nn
from torch.nn.utils import parametrizations

from mmstabvim.stability import layer_norms, parametrize_norm
from mmstabvim.stability.weights.layers import (
    operator_of,
    weight_parameter,
)
from mmstabvim.stability.weights.parametrizations import (
    EstimatedNorm,
    WithoutAutocast,
    load_raw,
    put_raw,
    take_raw,
)

LAYERS = {
    'linear': lambda: nn.Linear(7, 5),
    'depthwise': lambda: nn.Conv1d(6, 6, 4, groups=6),
    'patches': lambda: nn.Conv2d(3, 6, 2, 2),
    'overlapping': lambda: nn.Conv2d(3, 6, 3, 2),
}
# PyTorch's function computes these
MATRICES = ('linear', 'patches')


def layer_of(kind):
    layer = LAYERS[kind]()
    values = detmat(1, layer.weight.numel(), 1).reshape(layer.weight.shape)
    layer.weight.data.copy_(2 * values)
    return layer


def weight_after(layer, steps=100):
    """Weight of an evaluated layer, with converged estimates."""
    for _ in range(steps):
        layer.train().weight  # noqa: B018
    return layer.eval().weight.detach()


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('rule', ['bound', 'divide', 'learned'])
def test_parametrized_layers_obey(kind, rule):
    layer = layer_of(kind)
    norm = layer_norms({'': layer})['']
    parametrize_norm(layer, rule, 1.5)
    weight_after(layer)
    assert layer_norms({'': layer})[''] == pytest.approx(1.5, rel=1e-5)
    small = layer_of(kind)
    small.weight.data.mul_(1.2 / norm)
    plain = small.weight.detach().clone()
    parametrize_norm(small, rule, 1.5)
    if rule == 'bound':
        assert torch.equal(weight_after(small), plain)
    else:
        wanted = plain * 1.5 / 1.2
        torch.testing.assert_close(
            weight_after(small), wanted, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize('kind', MATRICES)
def test_division_is_pytorchs(kind):
    """Equal weights and gradients from equal vectors."""
    ours, theirs = layer_of(kind), layer_of(kind)
    parametrize_norm(ours, 'divide')
    parametrizations.spectral_norm(theirs)
    state = ours.parametrizations.weight[0].inner.state_dict()
    theirs.parametrizations.weight[0].load_state_dict(state)
    for layer in (ours, theirs):
        # positive, so that no constant weight is the best
        (layer.weight * layer.weight.detach().abs()).sum().backward()
    grads = [
        layer.parametrizations.weight.original.grad for layer in (ours, theirs)
    ]
    assert torch.equal(*grads)
    assert torch.equal(ours.eval().weight, theirs.eval().weight)


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('rule', ['bound', 'divide', 'learned'])
def test_gradient_goes_through_the_norm(kind, rule):
    """With converged vectors that of the exact rule, by differences."""
    layer = layer_of(kind).double()
    parametrize_norm(layer, rule, 1.5)
    weight_after(layer, 200)
    wanted = copy.deepcopy(layer)
    target = detmat(1, layer.weight.numel(), 9).reshape(layer.weight.shape)
    (layer.weight * target).sum().backward()
    original = wanted.parametrizations.weight.original
    operator = operator_of(layer)

    def loss(weight):
        norm = operator.norms(weight[None])[0]
        return (1.5 * weight / norm * target).sum()

    exact = torch.autograd.functional.jacobian(loss, original.detach())
    found = layer.parametrizations.weight.original.grad
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
    if rule == 'learned':
        gain = layer.parametrizations.weight[1].gain
        value = (layer.weight * target).sum() / 1.5
        torch.testing.assert_close(gain.grad, value.detach())


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('rule', ['bound', 'divide'])
def test_gradient_of_two_forwards(kind, rule):
    """The second moves the vectors that the first one's graph needs."""
    layer = layer_of(kind)
    parametrize_norm(layer, rule)
    single = copy.deepcopy(layer)
    first, second = layer.weight, layer.weight
    (first.square().sum() + 0 * second.sum()).backward()
    single.weight.square().sum().backward()
    gradients = [weight_parameter(one).grad for one in (layer, single)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('rule', ['bound', 'divide', 'learned'])
def test_evaluation_changes_no_vector(kind, rule):
    layer = layer_of(kind)
    parametrize_norm(layer, rule)
    before = copy.deepcopy(layer.state_dict())
    first = layer.eval().weight
    assert torch.equal(layer.weight, first)
    layer_norms({'': layer.train()})
    after = layer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    layer.weight  # noqa: B018
    moved = [
        k for k, v in layer.state_dict().items() if (v != before[k]).any()
    ]
    assert bool(moved) == (kind != 'depthwise')
    assert not any('original' in name for name in moved)


@pytest.mark.parametrize('kind', MATRICES)
def test_start_does_not_depend_on_the_random_state(kind):
    """Nor does it draw from it."""
    states = []
    for seed in (1, 2):
        layer = layer_of(kind)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        parametrize_norm(layer, 'divide')
        assert torch.equal(torch.get_rng_state(), state)
        states.append(layer.parametrizations.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize('kind', LAYERS)
def test_learned_gain_can_start_with_the_layer_as_it_is(kind):
    layer = layer_of(kind)
    plain = layer.weight.detach().clone()
    parametrize_norm(layer, 'learned', None)
    torch.testing.assert_close(layer.eval().weight.detach(), plain)
    names = [name for name, _ in layer.named_parameters()]
    assert [n for n in names if n.endswith('.gain')]


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('rule', ['bound', 'divide', 'learned'])
def test_states_of_plain_and_parametrized_layers(kind, rule):
    """Out of one into the other and back, with the same weight."""
    layer = layer_of(kind)
    parametrize_norm(layer, rule, 1.5)
    weight = weight_after(layer, 30)
    state = {f'a.{k}': v for k, v in layer.state_dict().items()}
    whole = dict(state)
    raw = take_raw(layer, state, 'a.')
    assert sorted(state) == ['a.bias', 'a.weight']
    plain = LAYERS[kind]()
    plain.load_state_dict({k[2:]: v for k, v in state.items()})
    assert torch.equal(plain.weight, weight)
    # plain into parametrized
    other = LAYERS[kind]()
    parametrize_norm(other, rule, 1.5)
    other.load_state_dict(plain.state_dict())
    tolerance = 1e-6 if rule == 'learned' else 1e-2
    torch.testing.assert_close(
        other.eval().weight.detach(), weight, rtol=tolerance, atol=1e-6
    )
    # both at once: the free parameters count
    both = {**layer.state_dict(), 'weight': torch.zeros_like(weight)}
    other.load_state_dict(both)
    assert torch.equal(other.weight, weight)
    parametrized = LAYERS[kind]()
    parametrize_norm(parametrized, rule, 1.5)
    # and all of it
    put_raw(raw, state, 'a.')
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[k], whole[k]) for k in whole)
    load_raw(parametrized, raw)
    assert torch.equal(parametrized.eval().weight, weight)


def test_zero_weights():
    zero = nn.Linear(3, 2, bias=False)
    zero.weight.data.zero_()
    parametrize_norm(zero, 'bound')
    assert not zero.weight.any()
    assert EstimatedNorm(operator_of(zero), zero.weight)(zero.weight) == 0
    for rule in ('divide', 'learned'):
        plain = nn.Linear(3, 2)
        plain.weight.data.zero_()
        with pytest.raises(ValueError, match='the weight is zero'):
            parametrize_norm(plain, rule)
    with pytest.raises(ValueError, match='parametrized already'):
        parametrize_norm(zero, 'bound')
    with pytest.raises(ValueError, match='max_norm must be positive'):
        parametrize_norm(nn.Linear(2, 2), 'bound', 0.0)
    with pytest.raises(ValueError, match='rule must be one of'):
        parametrize_norm(nn.Linear(2, 2), 'clip')


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('rule', ['bound', 'divide'])
def test_autocast_does_not_round_the_norm(kind, rule):
    layer = layer_of(kind)
    parametrize_norm(layer, rule, 1.5)
    other = copy.deepcopy(layer)
    with torch.autocast('cpu', torch.bfloat16):
        rounded = layer.weight
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, other.weight)


def test_pytorchs_normalization_runs_without_autocast():
    """On a CPU its result is the same, on a GPU it would be rounded."""
    seen = []

    class Probe(nn.Module):
        def forward(self, weight):
            seen.append(torch.is_autocast_enabled('cpu'))
            return weight

    layer = layer_of('linear')
    parametrize_norm(layer, 'divide')
    assert type(layer.parametrizations.weight[0]) is WithoutAutocast
    with torch.autocast('cpu', torch.bfloat16):
        WithoutAutocast(Probe())(layer.weight)
    assert seen == [False]
