"""Learning rates and weight decay in the groups of a built optimizer."""

import logging
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from small_runs import ROOT, digits_config, train

import mmstabvim  # noqa: F401  lets mmseg be imported

ARCH = dict(embed_dims=16, num_layers=3, d_state=4)
LR, DECAY, RATE = 1e-2, 0.05, 0.5
CONSTRUCTOR = 'mmstabvim.LayerDecayOptimWrapperConstructor'
HEADS = dict(
    ImageClassifier=dict(
        head=dict(type='LinearClsHead', num_classes=3, in_channels=16)
    ),
    EncoderDecoder=dict(
        decode_head=dict(
            type='FCNHead',
            in_channels=16,
            in_index=0,
            channels=8,
            num_classes=3,
            norm_cfg=dict(type='BN'),
        )
    ),
)


@pytest.fixture(autouse=True)
def _scope():
    yield
    init_default_scope('mmpretrain')


def build_model(kind='EncoderDecoder', **backbone):
    """A small segmentor or classifier; ``backbone`` changes the backbone."""
    segments = kind == 'EncoderDecoder'
    init_default_scope('mmseg' if segments else 'mmpretrain')
    if segments:
        import mmseg.models  # noqa: F401
    else:
        import mmpretrain.models  # noqa: F401
    cfg = dict(
        type='mmstabvim.VisionMamba',
        arch=ARCH,
        img_size=32,
        out_type='featmap' if segments else 'cls_token',
    )
    return MODELS.build(
        dict(type=kind, backbone=dict(cfg, **backbone), **HEADS[kind])
    )


def wrapper_config(rate=RATE, **paramwise):
    """An optimizer wrapper as the configs have it."""
    cfg = Config.fromfile(ROOT / 'configs/_base_/schedules/no_decay.py')
    wrapper = cfg.optim_wrapper.to_dict()
    custom_keys = paramwise.pop('custom_keys', {})
    wrapper['paramwise_cfg'].update(paramwise, layer_decay_rate=rate)
    wrapper['paramwise_cfg']['custom_keys'].update(custom_keys)
    return dict(
        wrapper,
        constructor=CONSTRUCTOR,
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
    )


def groups_by_name(model, **options):
    """The group of each parameter that is in the optimizer."""
    optimizer = build_optim_wrapper(model, wrapper_config(**options)).optimizer
    model = getattr(model, 'module', model)
    names = {p: name for name, p in model.named_parameters()}
    groups = {}
    for group in optimizer.param_groups:
        for p in group['params']:
            assert names[p] not in groups, f'{names[p]} is there twice'
            groups[names[p]] = group
    return groups


def wanted_scale(name, rate=RATE, num_layers=ARCH['num_layers']):
    """Scale by the rule, from the name alone."""
    block = re.match(r'(?:backbone\.)?layers\.(\d+)\.', name)
    if block:
        return rate ** (num_layers - int(block[1]))
    embedding = re.match(
        r'(?:backbone\.)?(patch_embed|pos_embed|cls_token)\b', name
    )
    return rate ** (num_layers + 1) if embedding else 1.0


@pytest.mark.parametrize('state_matrix', ['neg_exp', 'full'])
@pytest.mark.parametrize('kind', list(HEADS))
def test_rate_by_depth(kind, state_matrix):
    """Every parameter once, its rate by its depth, decay where due."""
    model = build_model(kind, state_matrix=dict(type=state_matrix))
    groups = groups_by_name(model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        group = groups[name]
        assert group['lr'] == pytest.approx(LR * wanted_scale(name)), name
        excluded = p.ndim == 1 or re.search(
            r'\.(state_matrix|pos_embed|cls_token)\b', name
        )
        assert group['weight_decay'] == (0 if excluded else DECAY), name
    scales = {group['lr_scale'] for group in groups.values()}
    assert scales == {1, 0.5, 0.25, 0.125, 0.0625}


def test_equal_settings_share_a_group():
    """At most one group that decays and one that does not at each depth."""
    wrapper = build_optim_wrapper(build_model(), wrapper_config())
    groups = wrapper.optimizer.param_groups
    kinds = [(g['layer_depth'], g['weight_decay'] > 0) for g in groups]
    assert len(set(kinds)) == len(kinds) == 2 * (ARCH['num_layers'] + 2)
    assert [depth for depth, _ in kinds] == sorted(d for d, _ in kinds)


def test_bare_backbone():
    """Without a prefix in the names."""
    model = build_model().backbone
    groups = groups_by_name(model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(LR * wanted_scale(name)), name


def test_other_backbones():
    """MMPretrain's transformers tell their depths too."""
    init_default_scope('mmpretrain')
    import mmpretrain.models  # noqa: F401

    arch = dict(
        embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=16
    )
    backbone = dict(type='VisionTransformer', arch=arch, img_size=32)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=backbone,
            **HEADS['ImageClassifier'],
        )
    )
    for name, group in groups_by_name(model).items():
        assert group['lr'] == pytest.approx(LR * wanted_scale(name)), name


def test_frozen_parameters_are_left_out():
    """And the others keep the rates of their depths."""
    model = build_model(frozen_stages=2)
    groups = groups_by_name(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(groups) == sorted(trained)
    assert len(trained) < len(list(model.parameters()))
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(LR * wanted_scale(name)), name


def test_custom_keys():
    """Multipliers act on top of the depth; other settings pass through."""
    keys = {
        'layers.1.': dict(lr_mult=3.0, decay_mult=0.1, eps=1e-3),
        'decode_head': dict(lr_mult=10.0),
    }
    groups = groups_by_name(build_model(), custom_keys=keys)
    block = groups['backbone.layers.1.mixer.in_proj.weight']
    assert block['lr'] == pytest.approx(LR * 3 * RATE**2)
    assert block['weight_decay'] == pytest.approx(DECAY * 0.1)
    assert block['eps'] == 1e-3
    head = groups['decode_head.conv_seg.weight']
    assert head['lr'] == pytest.approx(LR * 10)
    assert head['weight_decay'] == DECAY
    assert 'lr_mult' not in head
    other = groups['backbone.layers.2.mixer.in_proj.weight']
    assert (other['lr'], other['eps']) == (LR * RATE, 1e-8)


def test_tied_parameters():
    """In one group, that of the first name; mmengine alone refuses them."""
    model = build_model()
    first, second = (block.norm for block in model.backbone.layers[:2])
    second.weight = first.weight
    groups = groups_by_name(model)
    assert groups['backbone.layers.0.norm.weight']['layer_depth'] == 1
    assert 'backbone.layers.1.norm.weight' not in groups


def test_rate_one_decays_nothing():
    """The usual learning rate everywhere, the same weight decay."""
    groups = groups_by_name(build_model(), rate=1)
    assert {group['lr'] for group in groups.values()} == {LR}
    assert {group['weight_decay'] for group in groups.values()} == {0, DECAY}


def test_wrapped_model(tmp_path):
    """Distributed training builds the optimizer of the wrapped model."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        model = build_model()
        wrapped = MMDistributedDataParallel(model)
        groups = groups_by_name(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        assert group['lr'] == pytest.approx(LR * wanted_scale(name)), name


def test_in_a_run(tmp_path):
    """Scaled to the batch size, scheduled, and logged as one table."""
    cfg = digits_config(tmp_path)
    cfg.optim_wrapper = wrapper_config()
    cfg.auto_scale_lr = dict(base_batch_size=8, enable=True)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    cfg.param_scheduler = [dict(type='ConstantLR', factor=0.1, end=100)]
    cfg.log_level = 'INFO'
    runner = train(cfg)
    for group in runner.optim_wrapper.optimizer.param_groups:
        scale = RATE ** (3 - group['layer_depth'])  # two blocks
        assert group['initial_lr'] == pytest.approx(2 * LR * scale)
        assert group['lr'] == pytest.approx(0.2 * LR * scale)
    (log,) = (tmp_path / 'work').glob('*/*.log')
    text = log.read_text()
    assert text.count('Groups of the optimizer') == 1
    assert 'paramwise_options' not in text
    rows = re.findall(r'^\| +(\d) \| +([\d.]+) \|', text, re.MULTILINE)
    assert [int(depth) for depth, _ in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {float(scale) for _, scale in rows} == {0.125, 0.25, 0.5, 1}


class Records(logging.Handler):
    """Keeps the messages of a logger."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def log():
    """Messages logged in the meantime."""
    logger, handler = MMLogger.get_current_instance(), Records()
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)


def test_table(log):
    """Every parameter is counted once, the frozen ones in the last row."""
    model = build_model(frozen_stages=0)
    build_optim_wrapper(model, wrapper_config())
    (text,) = [text for text in log if 'of the optimizer' in text]
    rows = [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in text.splitlines()[3:]
    ]
    parameters = list(model.parameters())
    assert sum(int(row[4]) for row in rows) == len(parameters)
    elements = sum(int(row[5].replace(',', '')) for row in rows)
    assert elements == sum(p.numel() for p in parameters)
    assert rows[0][0] == '1'  # the embeddings are frozen
    frozen = 'backbone.cls_token, backbone.patch_embed, backbone.pos_embed'
    assert rows[-1] == ['frozen', '', '', '', '4', '12,400', frozen]


def test_only_its_own_lines_are_kept_out(log):
    """mmengine's lines of one parameter: gone here, back afterwards."""
    cfg = wrapper_config()
    build_optim_wrapper(build_model(frozen_stages=0), cfg)
    del cfg['constructor']
    assert not [t for t in log if 'paramwise' in t or 'requires_grad' in t]
    build_optim_wrapper(build_model(frozen_stages=0), cfg)
    assert [t for t in log if 'paramwise' in t]
    assert [t for t in log if 'requires_grad' in t]


@pytest.mark.parametrize('rate', [None, 0, 1.01, -0.5, '0.9'])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=r'layer_decay_rate.*got'):
        build_optim_wrapper(build_model(), wrapper_config(rate=rate))


def test_no_learning_rate():
    cfg = wrapper_config()
    del cfg['optimizer']['lr']
    with pytest.raises(ValueError, match='learning rate lr, got'):
        build_optim_wrapper(build_model(), cfg)


def test_backbone_that_knows_no_depth():
    model = build_model()
    model.backbone = torch.nn.Conv2d(3, 16, 1)
    with pytest.raises(ValueError, match=r'get_layer_depth.*got Conv2d'):
        build_optim_wrapper(model, wrapper_config())
