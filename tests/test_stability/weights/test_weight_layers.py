"""Layers chosen by name, their norms and projections."""

import copy
import math

import pytest
import torch
from stability_oracles import detmat
from torch import nn
from weight_checks import operator_matrix, top

from mmstabvim.stability import find_layers, layer_norms, spectral_norm
from mmstabvim.stability.weights.layers import (
    START_STEPS,
    group_layers,
    operator_of,
    project_norms_,
)


class Mixer(nn.Module):
    """Every kind of layer, with the names of a Vision Mamba."""

    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(4, 6, bias=False)
        self.x_proj = nn.Linear(6, 4)
        self.out_proj = nn.Linear(4, 6)
        self.conv1d = nn.Conv1d(6, 6, 4, groups=6)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 4, 2, 2)
        self.layers = nn.ModuleList(Mixer() for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
        self.decode_head = nn.Conv2d(4, 2, 3, padding=1)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.head[1].weight


@pytest.fixture
def model():
    """Weights larger than 1 in norm, the same in every run."""
    model = Model()
    for tag, parameter in enumerate(model.parameters()):
        values = detmat(1, parameter.numel(), tag).reshape(parameter.shape)
        parameter.data.copy_(2 * values)
    return model


def test_patterns_match_whole_parts_of_names(model):
    def found(*patterns):
        return list(find_layers(model, patterns))

    assert found('in_proj') == ['layers.0.in_proj', 'layers.1.in_proj']
    assert found('layers.1', 'in_proj') == [
        'layers.0.in_proj',
        'layers.1.in_proj',
        'layers.1.x_proj',
        'layers.1.out_proj',
        'layers.1.conv1d',
    ]
    assert found('head') == ['head.1']
    assert found('*head') == ['head.1', 'decode_head']
    assert found('layers.*.conv1d') == ['layers.0.conv1d', 'layers.1.conv1d']
    assert found('tied', 'head') == ['head.1']  # one weight: the first
    assert found('tied') == ['tied']


@pytest.mark.parametrize(
    ('patterns', 'message'),
    [
        (
            ['in_prj'],
            r"'in_prj' matches no linear .* of Model; near names: \[",
        ),
        (['in_prj'], 'in_proj'),
        (['in_proj', 'norm'], "'norm' matches no"),
        (['qkv'], r"names: \['patch_embed', 'layers', 'in_proj'"),
        (['proj'], 'x_proj'),
        ([], 'must be a list of name patterns'),
        ('in_proj', 'must be a list of name patterns'),
    ],
    ids=range(7),
)
def test_a_pattern_that_matches_nothing(model, patterns, message):
    with pytest.raises(ValueError, match=message):
        find_layers(model, patterns)


def test_norms_of_layers_are_those_of_their_operators(model):
    """Each against the matrix of the layer itself; bounds where it says."""
    double_model = copy.deepcopy(model).double()
    layers = find_layers(double_model, ['layers.0', 'patch_embed', '*head'])
    inputs = {
        'patch_embed': (3, 4, 6),
        'layers.0.in_proj': (4,),
        'layers.0.x_proj': (6,),
        'layers.0.out_proj': (4,),
        'layers.0.conv1d': (6, 40),
        'head.1': (4,),
        'decode_head': (4, 6, 6),
    }
    norms = layer_norms(layers)
    assert list(norms) == list(layers)
    for name, shape in inputs.items():
        layer = copy.deepcopy(layers[name])
        if layer.bias is not None:
            layer.bias.data.zero_()
        with torch.no_grad():
            exact = top(operator_matrix(layer, *shape)).item()
        if name == 'layers.0.conv1d':
            assert 0.98 * norms[name] < exact <= norms[name]
        elif name == 'decode_head':
            assert exact < norms[name] <= 3 * exact
        else:
            assert norms[name] == pytest.approx(exact, rel=1e-9)


def test_groups_of_a_convolution_are_matrices():
    layer = nn.Conv1d(4, 6, 3, 3, groups=2).double()
    with torch.no_grad():
        layer.bias.zero_()
        exact = top(operator_matrix(layer, 4, 9)).item()
    assert layer_norms({'x': layer})['x'] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    ('layer', 'message'),
    [
        (nn.LayerNorm(3), 'linear or a convolution, got LayerNorm'),
        (nn.ConvTranspose2d(2, 2, 2), 'got ConvTranspose2d'),
        (nn.Conv2d(2, 2, 2, padding_mode='reflect'), "got 'reflect'"),
    ],
    ids=range(3),
)
def test_layers_without_a_bound_are_refused(layer, message):
    with pytest.raises((TypeError, ValueError), match=message):
        operator_of(layer)


ALL = ['layers', 'patch_embed', '*head']


@pytest.mark.parametrize('rule', ['bound', 'divide'])
def test_projection_gives_the_norm_and_is_idempotent(model, rule):
    layers = find_layers(model, ALL)
    small = layers['layers.0.in_proj'].weight
    small.data.mul_(0.5 / spectral_norm(small.detach()))
    zero = layers['layers.1.in_proj'].weight
    zero.data.zero_()
    before = {n: layer.weight.clone() for n, layer in layers.items()}
    groups, bounds = group_layers(layers), dict.fromkeys(layers, 1.5)
    assert len(groups) < len(layers)
    project_norms_(groups, bounds, rule, None)
    for name, norm in layer_norms(layers).items():
        weight = layers[name].weight
        assert weight.requires_grad
        if weight is zero:
            assert not weight.any()
        elif weight is small and rule == 'bound':
            assert torch.equal(weight, before[name])
        else:
            assert norm == pytest.approx(1.5, rel=1e-6)
            # the direction stays
            scale = weight.norm() / before[name].norm()
            torch.testing.assert_close(weight, before[name] * scale)
    after = {n: layer.weight.clone() for n, layer in layers.items()}
    project_norms_(groups, bounds, rule, None)
    assert all(
        torch.equal(layer.weight, after[n]) for n, layer in layers.items()
    )


def test_projection_by_estimates_gets_there(model):
    """From below: the norm comes out slightly too large, less and less."""
    layers = find_layers(model, ALL)
    groups, bounds = group_layers(layers), dict.fromkeys(layers, 1.0)
    excess = []
    for steps in (1, START_STEPS, 300):
        project_norms_(groups, bounds, 'bound', steps)
        excess.append(max(layer_norms(layers).values()) - 1)
    assert excess[0] > 1e-3
    assert excess[0] > excess[1] > excess[2]
    assert excess[2] == pytest.approx(0, abs=1e-5)


def test_estimates_go_on_where_they_ended(model):
    """Fifteen single steps are one call with fifteen."""
    layers = find_layers(model, ['in_proj'])
    (once,), (often,) = group_layers(layers), group_layers(layers)
    together = once.estimate(START_STEPS)
    for _ in range(START_STEPS):
        single = often.estimate()
    torch.testing.assert_close(single, together)
    (resumed,) = group_layers(layers)
    resumed.take_vectors(often.vectors)
    assert torch.equal(resumed.estimate(), often.estimate())


@pytest.mark.parametrize('steps', [None, 1])
@pytest.mark.parametrize('layer', ['in_proj', 'conv1d'])
def test_projection_names_the_layer_with_a_nan(model, layer, steps):
    layers = find_layers(model, ALL)
    layers[f'layers.1.{layer}'].weight.data.view(-1)[2] = math.nan
    before = layers['head.1'].weight.clone()
    with pytest.raises(ValueError, match=rf'layers\.1\.{layer}\.weight has'):
        project_norms_(
            group_layers(layers), dict.fromkeys(layers, 1.0), 'bound', steps
        )
    assert torch.equal(layers['head.1'].weight, before)


def test_bfloat16_weights_are_measured_in_float32(model):
    weight = model.layers[0].in_proj.weight
    half = copy.deepcopy(model).bfloat16()
    (group,) = group_layers(find_layers(half, ['layers.0.in_proj']))
    estimate = group.estimate(100)
    assert estimate.dtype == torch.float32
    wanted = spectral_norm(weight.detach().bfloat16().float())
    torch.testing.assert_close(estimate[0], wanted, rtol=1e-5, atol=0)
