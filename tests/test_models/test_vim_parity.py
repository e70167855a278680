"""Parity with the official implementation, from its stored numbers."""

import json

import pytest
import torch
from mmengine.registry import init_default_scope

from mmstabvim import VisionMamba
from mmstabvim.models.vim_checkpoint import from_official

GRADIENTS = {
    'layers.0.mixer.A_log',
    'layers.0.mixer.A_b_log',
    'layers.3.mixer.x_proj.weight',
    'layers.1.mixer.dt_proj.bias',
    'layers.2.mixer.D_b',
    'patch_embed.proj.weight',
    'pos_embed',
}


def official_state(data, dtype):
    return {
        key.removeprefix('state/'): torch.from_numpy(data[key]).to(dtype)
        for key in data.files
        if key.startswith('state/')
    }


def build(data, dtype, **kwargs):
    """The golden model as an ImageClassifier, weights loaded strictly."""
    import mmpretrain  # noqa: F401
    from mmpretrain.registry import MODELS

    config = json.loads(str(data['config_json']))
    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='mmstabvim.VisionMamba',
                arch=dict(
                    embed_dims=config['embed_dim'],
                    num_layers=config['depth'],
                    d_state=config['d_state'],
                ),
                img_size=config['img_size'],
                patch_size=config['patch_size'],
                **kwargs,
            ),
            head=dict(
                type='LinearClsHead',
                num_classes=config['num_classes'],
                in_channels=config['embed_dim'],
            ),
        )
    )
    converted, unused = from_official(official_state(data, dtype))
    assert not unused
    model.to(dtype).load_state_dict(converted, strict=True)
    return model.eval()


@pytest.mark.parametrize('backend', ['reference', 'cpu'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_every_stored_number_agrees(golden, dtype, backend):
    """Intermediates, logits and gradients against the float64 values."""
    data = golden('vim_cls_midcls.npz')
    model = build(data, dtype, backend=backend)
    seen = {}
    for i, block in enumerate(model.backbone.layers):

        def record(module, args, output, i=i):
            seen[f'hidden_states/{i}'], seen[f'residual/{i}'] = output

        block.register_forward_hook(record)
    image = torch.from_numpy(data['input']).to(dtype).requires_grad_()
    (seen['features'],) = model.backbone(image)
    seen['logits'] = model.head((seen['features'],))
    seen['logits'].square().sum().backward()
    seen['grad_input'] = image.grad
    by_official_name = official_gradients(model)
    seen |= {f'grad/{name}': by_official_name[name] for name in GRADIENTS}

    stored = {k.removeprefix('f64/') for k in data.files if 'f64/' in k}
    assert stored == set(seen)
    for name, value in seen.items():
        exact = torch.from_numpy(data[f'f64/{name}'])
        largest = exact.abs().max().item()
        bound = 1e-10 * largest if dtype == torch.float64 else 2e-5
        if dtype == torch.float32 and name.startswith('grad'):
            bound = max(bound, 2e-6 * largest)
        error = (value.detach().double() - exact).abs().max().item()
        assert error <= bound, f'{name}: {error:.2e} > {bound:.2e}'


def official_gradients(model):
    from mmstabvim.models.vim_checkpoint import to_official

    gradients = {n: p.grad for n, p in model.named_parameters()}
    return to_official(gradients)[0]


@pytest.mark.parametrize(
    'wrong',
    [
        dict(b_disc='zoh'),
        dict(cls_token='head'),
        dict(out_type='avg_featmap'),
    ],
    ids=str,
)
def test_numbers_tell_a_wrong_model(golden, wrong):
    """Each deviation moves the logits far more than rounding does."""
    data = golden('vim_cls_midcls.npz')
    model = build(data, torch.float64, **wrong)
    image = torch.from_numpy(data['input']).double()
    with torch.no_grad():
        logits = model.head(model.backbone(image))
    error = (logits - torch.from_numpy(data['f64/logits'])).abs().max()
    assert error > 1e-3


def test_backbone_alone_loads_with_a_prefix(golden, tmp_path):
    """``init_cfg`` with a prefix fills the backbone from a classifier."""
    data = golden('vim_cls_midcls.npz')
    converted, _ = from_official(official_state(data, torch.float32))
    path = tmp_path / 'vim.pth'
    torch.save({'state_dict': converted}, path)
    backbone = VisionMamba(
        dict(embed_dims=48, num_layers=4),
        img_size=64,
        init_cfg=dict(
            type='Pretrained', checkpoint=str(path), prefix='backbone.'
        ),
    )
    backbone.init_weights()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, converted[f'backbone.{name}']), name
