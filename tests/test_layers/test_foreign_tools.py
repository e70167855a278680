"""Adapters, pruning, norms by hooks, quantization on the parts of a mixer.

Each takes effect, with a gradient, or fails.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mmstabvim import VisionMamba

PARTS = ['in_proj', 'conv1d', 'ssm.x_proj', 'ssm.dt_proj', 'out_proj']


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionMamba(
        dict(embed_dims=16, num_layers=2, d_state=4), img_size=16, patch_size=4
    )


@pytest.fixture
def image():
    return torch.randn(
        2, 3, 16, 16, generator=torch.Generator().manual_seed(0)
    )


class LowRank(nn.Module):
    """An adapter around a layer, as those of adapter libraries."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    'part', ['in_proj', 'ssm.x_proj', 'ssm.dt_proj', 'out_proj']
)
def test_an_adapter_is_trained(part, model, image):
    before = model(image)[0].detach()
    mixer = model.layers[0].mixer
    owner, _, name = part.rpartition('.')
    owner = mixer.get_submodule(owner)
    adapter = LowRank(getattr(owner, name))
    setattr(owner, name, adapter)
    after = model(image)[0]
    after.sum().backward()
    assert (after - before).abs().max() > 1e-6
    assert adapter.up.weight.grad.any()
    assert adapter.down.weight.grad.any()


@pytest.mark.parametrize('part', PARTS)
def test_pruning_takes_effect(part, model, image):
    before = model(image)[0].detach()
    layer = model.layers[0].mixer.get_submodule(part)
    prune.l1_unstructured(layer, 'weight', amount=0.5)
    after = model(image)[0]
    after.sum().backward()
    assert (after - before).abs().max() > 1e-6
    grad = layer.weight_orig.grad
    assert not grad[layer.weight_mask == 0].any()
    assert grad[layer.weight_mask == 1].any()


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize(
    'norm', [parametrizations.weight_norm, nn.utils.spectral_norm]
)
def test_a_norm_takes_effect(norm, part, model, image):
    """By a parametrization, and by a hook of the forward pass."""
    layer = norm(model.layers[0].mixer.get_submodule(part))
    before = model(image)[0].detach()
    free = next(p for n, p in layer.named_parameters() if 'bias' not in n)
    with torch.no_grad():
        free[0].mul_(1.5)
    after = model(image)[0]
    after.sum().backward()
    assert (after - before).abs().max() > 1e-7
    assert free.grad.any()


@pytest.mark.parametrize('part', PARTS)
def test_hooks_see_a_layer(part, model, image):
    """A hook on the forward pass is called and can change the output."""
    layer = model.layers[0].mixer.get_submodule(part)
    before = model(image)[0]
    layer.register_forward_hook(lambda module, args, output: 0 * output)
    assert (model(image)[0] - before).abs().max() > 1e-6


@pytest.mark.filterwarnings('ignore')
def test_dynamic_quantization(model, image):
    """The plain linear layers; the others stay as they are."""
    model.eval()
    quantized = torch.ao.quantization.quantize_dynamic(
        model, {nn.Linear}, dtype=torch.qint8
    )
    exact, found = model(image)[0], quantized(image)[0]
    assert type(quantized.layers[0].mixer.in_proj) is not nn.Linear
    assert 0 < (found - exact).abs().max() < 0.1
