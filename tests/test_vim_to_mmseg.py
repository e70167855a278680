"""Converting official checkpoints for dense use, there and back."""

import re

import pytest
import torch
from converter_runs import converter, refusal, same
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint

from mmstabvim import VisionMamba
from mmstabvim.apis.convert import to_mmseg
from mmstabvim.apis.convert import to_official as convert_back
from mmstabvim.layers.position_embedding import resize_position_embedding
from mmstabvim.models.vim_checkpoint import to_official, to_official_segmentor

ARCH = dict(embed_dims=8, num_layers=2, d_state=4)


@pytest.fixture
def convert(capsys):
    """Run the tool in this process and return what it printed."""
    return converter('vim_to_mmseg', capsys)


def official_classifier(**kwargs):
    """Weights of a small classifier, under the official names."""
    torch.manual_seed(0)
    backbone = VisionMamba(
        **dict(arch=ARCH, img_size=64, out_type='raw') | kwargs
    )
    state = {f'backbone.{k}': v for k, v in backbone.state_dict().items()}
    state['head.fc.weight'] = torch.randn(5, 8)
    state['head.fc.bias'] = torch.randn(5)
    return to_official(state)[0]


@pytest.fixture
def source(tmp_path):
    """Write weights as an official file and return its path."""

    def write(state, key='model'):
        path = tmp_path / 'official.pth'
        torch.save({key: state, 'epoch': 3}, path)
        return path

    return write


def read(path):
    return torch.load(path, weights_only=True)


def patch_vectors(pos_embed, token):
    """The position embedding without one vector."""
    return torch.cat([pos_embed[:, :token], pos_embed[:, token + 1 :]], dim=1)


# classifiers


def test_the_token_goes_from_the_middle(source, tmp_path, convert):
    """Its vector is number ``num_patches // 2``; nothing else changes."""
    state = official_classifier()
    said = convert(source(state), tmp_path / 'new.pth')
    for line in ('head.weight', 'head.bias', 'cls_token'):
        assert f'not used: {line}\n' in f'{said}\n'
    assert 'class token taken to be in the middle' in said
    assert 'cls_token=None, grid=(4, 4)' in said
    new = read(tmp_path / 'new.pth')['state_dict']
    assert all(name.startswith('backbone.') for name in new)
    assert 'backbone.cls_token' not in new
    wanted = patch_vectors(state.pop('pos_embed'), 8)
    assert torch.equal(new.pop('backbone.pos_embed'), wanted)
    for name in ('cls_token', 'head.weight', 'head.bias'):
        del state[name]
    assert same(to_official(new)[0], state)


def test_the_token_goes_from_the_front_if_said_so(source, tmp_path, convert):
    state = official_classifier(cls_token='head')
    said = convert(source(state), tmp_path / 'new.pth', '--cls-token', 'head')
    assert 'taken to be' not in said
    new = read(tmp_path / 'new.pth')['state_dict']
    assert torch.equal(new['backbone.pos_embed'], state['pos_embed'][:, 1:])


def test_two_tokens_are_seen(source, tmp_path, convert):
    state = official_classifier(cls_token='double')
    said = convert(source(state), tmp_path / 'new.pth')
    assert 'not used: cls_token_tail' in said
    new = read(tmp_path / 'new.pth')['state_dict']
    assert torch.equal(new['backbone.pos_embed'], state['pos_embed'][:, 1:-1])


def test_round_trip_keeps_every_weight_but_the_head(source, tmp_path, convert):
    state = official_classifier()
    convert(source(state), tmp_path / 'new.pth', '--keep-cls-token')
    convert(tmp_path / 'new.pth', tmp_path / 'back.pth', '--reverse')
    back = read(tmp_path / 'back.pth')['model']
    wanted = {k: v for k, v in state.items() if not k.startswith('head.')}
    assert same(back, wanted)


def test_the_same_grid_is_the_identity(source, tmp_path, convert):
    """14 x 14 patches for 224 pixels stay bit for bit."""
    state = official_classifier(img_size=224)
    plain, resized = tmp_path / 'plain.pth', tmp_path / 'resized.pth'
    convert(source(state), plain)
    convert(source(state), resized, '--img-size', 224)
    assert same(read(plain)['state_dict'], read(resized)['state_dict'])


@pytest.mark.parametrize('keep', [False, True])
@pytest.mark.parametrize(
    ('options', 'grid'),
    [
        (['--img-size', 96], (6, 6)),
        (['--img-size', 32, 100], (2, 7)),
        (['--img-size', 64, '--patch-stride', 8], (7, 7)),
    ],
    ids=['square', 'wide', 'overlapping'],
)
def test_only_the_patches_are_resized(
    source, tmp_path, convert, options, grid, keep
):
    state = official_classifier()
    flags = [*options, '--keep-cls-token'] if keep else options
    convert(source(state), tmp_path / 'new.pth', *flags)
    new = read(tmp_path / 'new.pth')['state_dict']
    patches = patch_vectors(state['pos_embed'], 8)
    image = patches.transpose(1, 2).unflatten(2, (4, 4))
    resized = torch.nn.functional.interpolate(
        image, grid, mode='bicubic', align_corners=False
    )
    got = new['backbone.pos_embed']
    if keep:
        middle = grid[0] * grid[1] // 2
        assert torch.equal(got[:, middle], state['pos_embed'][:, 8])
        got = patch_vectors(got, middle)
    assert torch.equal(got, resized.flatten(2).transpose(1, 2))


@pytest.mark.parametrize('img_size', [64, (32, 128), (48, 80)], ids=str)
def test_the_result_loads_at_another_size(source, tmp_path, convert, img_size):
    """Also a wide grid with as many patches as the square one."""
    convert(source(official_classifier()), tmp_path / 'new.pth')
    model = torch.nn.Module()
    model.backbone = VisionMamba(
        ARCH, img_size=img_size, cls_token=None, out_type='featmap'
    )
    load_checkpoint(model, str(tmp_path / 'new.pth'), strict=True)
    saved = read(tmp_path / 'new.pth')['state_dict']['backbone.pos_embed']
    grid = model.backbone.grid
    square = resize_position_embedding(saved, (4, 4), grid, None)
    assert torch.equal(model.backbone.pos_embed, square)


def test_the_layout_is_in_the_file(source, tmp_path, convert):
    """So that the token in front is known when the file is loaded."""
    state = official_classifier(cls_token='head')
    new = tmp_path / 'new.pth'
    convert(source(state), new, '--cls-token', 'head', '--keep-cls-token')
    model = torch.nn.Module()
    model.backbone = VisionMamba(ARCH, img_size=64)
    with pytest.raises(ValueError, match="cls_token 'head', the model 'midd"):
        load_checkpoint(model, str(new))


REFUSED = [
    (dict(cls_token=None), ['--cls-token', 'middle'], 'wants one class token'),
    (dict(cls_token='double'), ['--cls-token', 'head'], 'token, got 2'),
    (dict(img_size=(32, 64)), [], 'a square number of patches .* got 8: give'),
    ({}, ['--grid', 3, 5], r'3x5 patches beside its class tokens .1., got 16'),
    (dict(with_pos_embed=False), ['--img-size', 96], 'no position embedding'),
    ({}, ['--img-size', 8], 'at least one patch, 16x16 pixels, got 8x8'),
    ({}, ['--img-size', 1, 2, 3], '--img-size wants one or two'),
    ({}, ['--img-size', 0], '--img-size: must be at least 1, got 0'),
    ({}, ['--patch-stride', 8], '--patch-stride is for --img-size'),
    ({}, ['--reverse', '--img-size', 96], 'does not go with --reverse'),
    ({}, ['--reverse', '--ema'], '--ema reads an official file'),
    ({}, ['--ema'], "must hold 'model_ema'"),
]


@pytest.mark.parametrize(('kwargs', 'options', 'message'), REFUSED)
def test_what_cannot_be_converted(
    source, tmp_path, convert, capsys, kwargs, options, message
):
    """Named, and nothing is written."""
    path = source(official_classifier(**kwargs))
    target = tmp_path / 'new.pth'
    said = refusal(convert, capsys, path, target, *options)
    assert re.search(message, said), said
    assert not target.exists()


def test_a_grid_that_is_no_square_can_be_given(source, tmp_path, convert):
    state = official_classifier(img_size=(32, 64))
    said = convert(source(state), tmp_path / 'new.pth', '--grid', 2, 4)
    assert 'grid=(2, 4)' in said


def test_from_python(tmp_path):
    """What the file holds is what the function gives."""
    state = official_classifier()
    done = to_mmseg({'model': state}, img_size=[96])
    assert done.sizes['grid'] == (6, 6)
    assert done.notes
    torch.save(done.checkpoint, tmp_path / 'new.pth')
    new = read(tmp_path / 'new.pth')
    assert same(new['state_dict'], done.weights)
    kept = to_mmseg({'model': state}, keep_cls_token=True, cls_token='head')
    back = convert_back(kept.checkpoint).weights
    wanted = {k: v for k, v in state.items() if not k.startswith('head.')}
    assert same(back, wanted)


# segmentors


def golden_official(golden):
    data = golden('vim_cls_midcls.npz')
    return {
        key.removeprefix('state/'): torch.from_numpy(data[key])
        for key in data.files
        if key.startswith('state/')
    }


def segmentor():
    """The golden model's sizes in an EncoderDecoder, two tiny heads."""
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS

    init_default_scope('mmseg')
    norm_cfg, channels = dict(type='SyncBN'), 48
    head = dict(num_classes=3, norm_cfg=norm_cfg, channels=8)
    torch.manual_seed(0)
    try:
        return MODELS.build(
            dict(
                type='EncoderDecoder',
                backbone=dict(
                    type='mmstabvim.VisionMamba',
                    arch=dict(embed_dims=48, num_layers=4),
                    img_size=64,
                    cls_token=None,
                    out_type='featmap',
                    out_indices=[0, 1, 2, 3],
                    feature='residual',
                    last_layer='add',
                ),
                neck=dict(
                    type='mmstabvim.SimpleFeaturePyramid',
                    in_channels=channels,
                    norm_cfg=norm_cfg,
                ),
                decode_head=dict(
                    type='UPerHead',
                    in_channels=[channels] * 4,
                    in_index=[0, 1, 2, 3],
                    pool_scales=(1, 2),
                    **head,
                ),
                auxiliary_head=dict(
                    type='FCNHead', in_channels=channels, in_index=2, **head
                ),
                test_cfg=ConfigDict(mode='whole'),
            )
        )
    finally:
        init_default_scope('mmpretrain')


def official_segmentor(golden, model):
    """A file as the official code writes it: backbone, scales, heads."""
    state = {}
    for name, value in golden_official(golden).items():
        if name == 'pos_embed':
            state['backbone.pos_embed'] = patch_vectors(value, 8)
        elif name not in ('cls_token', 'head.weight', 'head.bias'):
            state[f'backbone.{name}'] = value
    for name, value in model.state_dict().items():
        if name.startswith('neck.'):
            name = name.replace('neck.', 'backbone.')
        elif name.startswith('backbone.'):
            continue
        state[name] = value + 1
    return state


def test_official_segmentor_there_and_back(golden, source, tmp_path, convert):
    """It loads strictly, and back every weight is as it was."""
    model = segmentor()
    state = official_segmentor(golden, model)
    assert 'backbone.fpn1.0.weight' in state
    said = convert(source(state, 'state_dict'), tmp_path / 'new.pth')
    assert 'every weight was used' in said
    load_checkpoint(model, str(tmp_path / 'new.pth'), strict=True)
    assert same(to_official_segmentor(model.state_dict())[0], state)
    convert(tmp_path / 'new.pth', tmp_path / 'back.pth', '--reverse')
    assert same(read(tmp_path / 'back.pth')['state_dict'], state)
    with torch.no_grad():
        logits = model.eval()(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 3, 16, 16)
    assert logits.isfinite().all()


def test_a_segmentor_can_be_resized(golden, source, tmp_path, convert):
    state = official_segmentor(golden, segmentor())
    path = source(state, 'state_dict')
    convert(path, tmp_path / 'new.pth', '--img-size', 64, 96)
    new = read(tmp_path / 'new.pth')['state_dict']
    wanted = resize_position_embedding(
        state['backbone.pos_embed'], (4, 4), (4, 6), None
    )
    assert torch.equal(new['backbone.pos_embed'], wanted)


def test_strange_weights_of_a_segmentor_are_reported(
    golden, source, tmp_path, convert, capsys
):
    state = official_segmentor(golden, segmentor())
    state['backbone.rope.freqs_cos'] = torch.zeros(2)
    state['extra_head.weight'] = torch.zeros(2)
    path = source(state, 'state_dict')
    said = convert(path, tmp_path / 'new.pth')
    assert 'not used: backbone.rope.freqs_cos' in said
    assert 'not used: extra_head.weight' in said
    said = refusal(convert, capsys, path, tmp_path / 'ema.pth', '--ema')
    assert "no 'model_ema'" in said
    del state['backbone.layers.2.mixer.A_b_log']
    path = source(state, 'state_dict')
    said = refusal(convert, capsys, path, tmp_path / 'less.pth')
    assert '1 weights are missing' in said


def test_other_files_are_refused(source, tmp_path, convert, capsys):
    own = {'backbone.patch_embed.projection.weight': torch.zeros(8, 3, 4, 4)}
    cases = [
        (own, 'state_dict', 'give the file to init_cfg'),
        ({'conv1.weight': torch.zeros(3)}, 'model', 'no Vim weights'),
        ({'a': 3}, 'model', 'are no tensors'),
    ]
    for state, key, message in cases:
        path = source(state, key)
        said = refusal(convert, capsys, path, tmp_path / 'new.pth')
        assert message in said
        assert str(path) in said
        assert not (tmp_path / 'new.pth').exists()
