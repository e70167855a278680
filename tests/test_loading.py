"""Weights on their way into a model: found, renamed, counted, refused."""

import json

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from safetensors.torch import save_file
from small_runs import digits_config, scenes_config, train
from torch import nn

from mmstabvim import VisionMamba, load_weights
from mmstabvim.checkpoint import load_checkpoint_tensors
from mmstabvim.loading import find_weights, into_mmengine
from mmstabvim.models.vim_checkpoint import to_official, to_official_segmentor

ARCH = dict(embed_dims=16, num_layers=2, d_state=4)


def backbone(seed=0, **kwargs):
    torch.manual_seed(seed)
    options = dict(arch=ARCH, img_size=16, patch_size=4) | kwargs
    return VisionMamba(**options)


class Classifier(nn.Module):
    """The names of an ImageClassifier without its toolkit."""

    def __init__(self, seed=0, classes=3, **kwargs):
        super().__init__()
        self.backbone = backbone(seed, **kwargs)
        self.head = nn.Module()
        self.head.fc = nn.Linear(16, classes)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def renamed(state, old, new):
    return {new + k.removeprefix(old): v for k, v in state.items()}


DONOR = Classifier(seed=1).state_dict()
BARE = {
    k.removeprefix('backbone.'): v
    for k, v in DONOR.items()
    if k.startswith('backbone.')
}
FILES = {
    'mmengine': {'state_dict': DONOR, 'meta': {}},
    'bare state dict': DONOR,
    'distributed': {'state_dict': renamed(DONOR, '', 'module.')},
    'compiled': {'state_dict': renamed(DONOR, '', '_orig_mod.')},
    'compiled inside': {
        'state_dict': {
            k.replace('backbone.', 'backbone._orig_mod.'): v
            for k, v in DONOR.items()
        }
    },
    'lightning': {'state_dict': renamed(DONOR, '', 'model.')},
    'both': {'state_dict': renamed(DONOR, '', '_orig_mod.module.model.')},
    'another trainer': {'model_state_dict': renamed(DONOR, '', 'net.')},
    'unknown key': {'epoch': 3, 'weights': DONOR, 'optimizer': {'state': {}}},
    'official': {'model': to_official(DONOR)[0], 'args': {'lr': 1}},
    'official, averaged': {'model_ema': to_official(DONOR)[0]},
    'official, distributed': {
        'model': renamed(to_official(DONOR)[0], '', 'module.')
    },
}


@pytest.mark.parametrize('name', FILES)
def test_every_weight_of_a_known_file_is_loaded(tmp_path, name):
    torch.save(FILES[name], tmp_path / 'a.pth')
    model = Classifier()
    report = load_weights(model, tmp_path / 'a.pth', strict=True)
    assert equal(model.state_dict(), DONOR)
    assert len(report.loaded) == report.total == len(DONOR)
    assert report.complete


@pytest.mark.parametrize('name', FILES)
def test_the_same_through_mmengine(tmp_path, name):
    """``load_from``, the toolkits' tools and inferencers call this."""
    torch.save(FILES[name], tmp_path / 'a.pth')
    model = Classifier()
    load_checkpoint(model, str(tmp_path / 'a.pth'))
    assert equal(model.state_dict(), DONOR)


def test_safetensors(tmp_path):
    path = tmp_path / 'model.safetensors'
    save_file(DONOR, path)
    assert equal(load_checkpoint_tensors(path), DONOR)
    with open(path, 'rb') as file:
        assert equal(load_checkpoint_tensors(file), DONOR)
    model = Classifier()
    load_checkpoint(model, str(path))
    assert equal(model.state_dict(), DONOR)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match='damaged safetensors'):
        load_checkpoint_tensors(path)


# parts of a model


@pytest.mark.parametrize('prefix', [None, 'backbone.', 'backbone'])
@pytest.mark.parametrize('name', FILES)
def test_init_cfg_of_a_backbone(tmp_path, name, prefix):
    """A forgotten prefix is found; one that is not there does no harm."""
    torch.save(FILES[name], tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))
    if prefix:
        init_cfg['prefix'] = prefix
    model = backbone(init_cfg=init_cfg)
    model.init_weights()
    assert equal(model.state_dict(), BARE)


def test_a_bare_backbone_into_a_classifier(tmp_path):
    torch.save(BARE, tmp_path / 'a.pth')
    model = Classifier(seed=2)
    head = model.head.fc.weight.clone()
    report = load_weights(model, tmp_path / 'a.pth')
    assert equal(model.backbone.state_dict(), BARE)
    assert torch.equal(model.head.fc.weight, head)
    assert report.missing == ['head.fc.weight', 'head.fc.bias']
    assert "'backbone.' put in front of the names" in str(report)


def test_metadata_move_with_the_names(tmp_path):
    """The layout of the tokens counts wherever the backbone is."""
    donor = backbone(seed=1, cls_token='head', img_size=(16, 32))
    torch.save(donor.state_dict(), tmp_path / 'a.pth')
    model = Classifier(cls_token=None, img_size=(16, 32), out_type='raw')
    report = load_weights(model, tmp_path / 'a.pth')
    wanted = donor.pos_embed[:, 1:]
    assert torch.equal(model.backbone.pos_embed, wanted)
    assert report.unused == ['backbone.cls_token']


@pytest.mark.parametrize('prefix', [None, 'backbone.'])
def test_metadata_move_out_of_a_classifier(tmp_path, prefix):
    """``checkpoint_cls_token`` is for files that do not tell."""
    donor = Classifier(seed=1, cls_token='head')
    torch.save({'state_dict': donor.state_dict()}, tmp_path / 'a.pth')
    model = backbone(cls_token=None, out_type='raw')
    load_weights(model, tmp_path / 'a.pth', prefix=prefix)
    assert torch.equal(model.pos_embed, donor.backbone.pos_embed[:, 1:])


def test_a_key_as_prefix(tmp_path):
    """Averaged weights in place of the others."""
    other = {k: v + 1 for k, v in DONOR.items()}
    content = {
        'model': to_official(DONOR)[0],
        'model_ema': to_official(other)[0],
    }
    torch.save(content, tmp_path / 'a.pth')
    model = Classifier()
    report = load_weights(model, tmp_path / 'a.pth')
    assert equal(model.state_dict(), DONOR)
    assert "weights under 'model_ema' not used" in str(report)
    load_weights(model, tmp_path / 'a.pth', prefix='model_ema')
    assert equal(model.state_dict(), other)


class Wrapper(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        raise NotImplementedError


def test_wrapped_models(tmp_path):
    torch.save({'state_dict': DONOR}, tmp_path / 'a.pth')

    class Inner(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = Classifier()

        def forward(self, inputs):
            return inputs

    model = Wrapper(module=Inner())
    load_weights(model, tmp_path / 'a.pth', strict=True)
    assert equal(model.module.net.state_dict(), DONOR)
    compiled = torch.compile(Classifier())
    load_weights(compiled, tmp_path / 'a.pth', strict=True)
    assert equal(compiled._orig_mod.state_dict(), DONOR)
    part = Classifier()
    part.backbone = torch.compile(part.backbone)
    load_weights(part, tmp_path / 'a.pth', strict=True)
    assert equal(part.backbone._orig_mod.state_dict(), BARE)


# refusals


STRANGERS = {
    'another model': {f'blocks.{i}.w': torch.ones(3) for i in range(9)},
    'a head alone': {'head.fc.weight': torch.ones(3, 16)},
    'half of the layers': {
        k: v for k, v in DONOR.items() if 'layers.' not in k or '.0.norm' in k
    },
}


@pytest.mark.parametrize('name', STRANGERS)
@pytest.mark.parametrize('key', ['state_dict', 'model', None])
def test_nothing_or_too_little_is_an_error(tmp_path, name, key):
    state = STRANGERS[name]
    torch.save({key: state} if key else state, tmp_path / 'a.pth')
    model = Classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'a\.pth: .*') as error:
        load_checkpoint(model, str(tmp_path / 'a.pth'))
    said = str(error.value)
    assert next(iter(state)) in said or 'layers' in said
    assert 'random weights' in said or 'layers' in said
    if name == 'another model':
        assert equal(model.state_dict(), before)


def test_a_head_alone_into_a_head(tmp_path):
    """Only the part that is asked for is counted."""
    torch.save({'state_dict': DONOR}, tmp_path / 'a.pth')
    head = nn.Module()
    head.fc = nn.Linear(16, 3)
    load_weights(head, tmp_path / 'a.pth', prefix='head.')
    assert torch.equal(head.fc.weight, DONOR['head.fc.weight'])


def test_another_head_is_in_the_summary(tmp_path):
    torch.save({'model': to_official(DONOR)[0]}, tmp_path / 'a.pth')
    model = Classifier(classes=5, img_size=32)
    report = load_weights(model, tmp_path / 'a.pth')
    said = str(report)
    assert 'head.fc.weight (3, 16), here (5, 16)' in said
    assert 'resized: backbone.pos_embed (1, 17, 16) -> (1, 65, 16)' in said
    assert "class token taken to be at 'middle'" in said
    assert 'official Vim classifier' in said
    with pytest.raises(RuntimeError, match='strict loading'):
        load_weights(model, tmp_path / 'a.pth', strict=True)


def test_two_parts_that_fit_equally_well(tmp_path):
    both = renamed(DONOR, '', 'student.') | renamed(DONOR, '', 'teacher.')
    torch.save({'state_dict': both}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r"'student\.' and 'teacher\.' fit"):
        load_weights(Classifier(), tmp_path / 'a.pth')
    report = load_weights(Classifier(), tmp_path / 'a.pth', prefix='teacher')
    assert report.complete


def test_no_weights_in_the_file():
    for content in ({}, {'epoch': 3}, {'optimizer': {'state': {0: 1}}}):
        with pytest.raises(ValueError, match='wanted weights by name'):
            find_weights(content)
    with pytest.raises(ValueError, match=r"under \['a', 'b'\]"):
        find_weights({'a': DONOR, 'b': DONOR})


def test_half_an_official_file(tmp_path):
    official = to_official(DONOR)[0]
    torch.save(
        {k: v for k, v in official.items() if '_b_log' not in k},
        tmp_path / 'a.pth',
    )
    with pytest.raises(ValueError, match='not a complete bidirectional Vim'):
        load_weights(Classifier(), tmp_path / 'a.pth')


def test_adapters_alone_are_enough(tmp_path):
    """A file with all that learns, beside frozen weights."""
    model = Classifier()
    model.requires_grad_(False)
    model.backbone.adapter = nn.Linear(2, 2)
    model.head.requires_grad_(True)
    state = {
        k: v
        for k, v in model.state_dict().items()
        if k.startswith(('head.', 'backbone.adapter.'))
    }
    torch.save({'state_dict': state}, tmp_path / 'a.pth')
    assert len(load_weights(model, tmp_path / 'a.pth').loaded) == len(state)
    torch.save(
        {'state_dict': {**state, 'x.y': state['head.fc.bias']}},
        tmp_path / 'b.pth',
    )
    with pytest.raises(ValueError, match=r'b\.pth: '):
        load_weights(model, tmp_path / 'b.pth')


# the tools and the toolkits


@pytest.mark.parametrize('ema', [False, True])
def test_runner_starts_from_an_official_file(tmp_path, ema):
    """``load_from`` with the classes of another data set."""
    cfg = digits_config(tmp_path)
    donor = backbone(seed=1, patch_size=4, img_size=64, in_channels=3)
    state = {f'backbone.{k}': v for k, v in donor.state_dict().items()}
    state |= {
        'head.fc.weight': torch.ones(7, 16),
        'head.fc.bias': torch.ones(7),
    }
    torch.save({'model': to_official(state)[0]}, tmp_path / 'vim.pth')
    cfg.load_from = str(tmp_path / 'vim.pth')
    cfg.model.backbone.in_channels = 3
    cfg.train_cfg.max_epochs = 1
    cfg.optim_wrapper.optimizer.lr = 0.0
    if ema:
        cfg.custom_hooks = [dict(type='EMAHook')]
    runner = train(cfg)
    weight = runner.model.backbone.layers[1].mixer.in_proj.weight
    assert torch.equal(weight, donor.layers[1].mixer.in_proj.weight)
    if ema:
        (hook,) = (h for h in runner.hooks if type(h).__name__ == 'EMAHook')
        mean = hook.ema_model.module.backbone.layers[1].mixer.in_proj.weight
        assert torch.equal(mean, weight)


def test_official_segmentor(tmp_path):
    from mmengine.registry import MODELS

    cfg = scenes_config(tmp_path)
    init_default_scope('mmseg')
    import mmseg.models  # noqa: F401

    torch.manual_seed(1)
    donor = MODELS.build(cfg.model).state_dict()
    official, unused = to_official_segmentor(donor)
    torch.save({'state_dict': official}, tmp_path / 'a.pth')
    torch.manual_seed(2)
    model = MODELS.build(cfg.model)
    report = load_weights(model, tmp_path / 'a.pth')
    assert 'official Vim segmentor' in str(report)
    kept = {k for k in donor if k not in unused}
    for name, value in model.state_dict().items():
        if name in kept:
            assert torch.equal(value, donor[name]), name
    assert not set(report.missing) - set(unused)
    from mmseg.apis import init_model

    cfg.model.backbone.init_cfg = None
    torch.save({'model': official}, tmp_path / 'b.pth')
    for file in ('a.pth', 'b.pth'):
        model = init_model(cfg, str(tmp_path / file), device='cpu')
        name = 'decode_head.conv_seg.weight'
        assert torch.equal(model.state_dict()[name], donor[name])


def test_published_numbers_from_an_official_file(golden, tmp_path):
    """The file as the official code writes it, the official logits."""
    from mmpretrain.registry import MODELS

    data = golden('vim_cls_midcls.npz')
    config = json.loads(str(data['config_json']))
    state = {
        k.removeprefix('state/'): torch.from_numpy(data[k])
        for k in data.files
        if k.startswith('state/')
    }
    torch.save({'model': state, 'epoch': 300}, tmp_path / 'vim.pth')
    init_default_scope('mmpretrain')
    model = MODELS.build(
        ConfigDict(
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
            ),
            head=dict(
                type='LinearClsHead',
                num_classes=config['num_classes'],
                in_channels=config['embed_dim'],
            ),
        )
    ).eval()
    load_checkpoint(model, str(tmp_path / 'vim.pth'), strict=True)
    with torch.no_grad():
        logits = model(torch.from_numpy(data['input']))
    wanted = torch.from_numpy(data['logits'])
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=0)


def test_summary_is_said_once(tmp_path, monkeypatch):
    """The EMA hook loads the same file a second time."""
    said = []
    monkeypatch.setattr(
        into_mmengine, 'print_log', lambda *a, **k: said.append(a)
    )
    torch.save({'state_dict': DONOR}, tmp_path / 'a.pth')
    for _ in range(2):
        load_checkpoint(Classifier(), str(tmp_path / 'a.pth'))
    ((text,),) = said
    assert f'a.pth: {len(DONOR)} of {len(DONOR)} weights' in text


# formats that are known and not read


FOREIGN = {
    'weights.h5': (b'\x89HDF\r\n\x1a\n' + bytes(90), 'Keras'),
    'model.onnx': (b'\x08\x07\x12\x07pytorch' + bytes(90), 'ONNX'),
    'model.gguf': (b'GGUF' + bytes(90), 'GGUF'),
    'array.npy': (b'\x93NUMPY' + bytes(90), 'NumPy'),
    'lfs.pth': (b'version https://git-lfs.github.com/spec/v1\n', 'Git LFS'),
    'page.pth': (b'<!DOCTYPE html><html>', 'web page'),
    'index.json': (b'{"weight_map": {"a": "1", "b": "2"}}', 'index of 2'),
    'gzip.pth': (b'\x1f\x8b' + bytes(90), 'gzip'),
    'flax.msgpack': (b'\x81\xa6params' + bytes(90), 'Flax'),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_a_foreign_format_is_named(tmp_path, name):
    content, wanted = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=wanted) as error:
        load_checkpoint_tensors(tmp_path / name)
    assert 'this format is not read' in str(error.value)
    assert 'damaged' not in str(error.value)


def test_programs_are_named(tmp_path):
    model = nn.Linear(2, 2)
    torch.jit.script(model).save(str(tmp_path / 'a.pt'))
    program = torch.export.export(model, (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / 'b.pt2')
    for name, wanted in (('a.pt', 'TorchScript'), ('b.pt2', 'torch.export')):
        with pytest.raises(ValueError, match=f'{wanted}.* not read'):
            load_checkpoint_tensors(tmp_path / name)


def test_a_folder_names_a_file_in_it(tmp_path):
    (tmp_path / 'epoch_3.pth').write_bytes(b'')
    with pytest.raises(FileNotFoundError, match=r'instance .*epoch_3\.pth'):
        load_checkpoint_tensors(tmp_path)
