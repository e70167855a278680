"""The neck: strides, names, norms, heads on it, bad input."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from torch import nn

from mmstabvim import SimpleFeaturePyramid
from mmstabvim.engine.segmentor_check import check_segmentor

ARCH = dict(embed_dims=8, num_layers=4, d_state=4)
BN = dict(type='BN')


@pytest.fixture(params=['mmseg', 'mmpretrain'])
def scope(request):
    init_default_scope(request.param)
    yield request.param
    init_default_scope('mmpretrain')


def build(**kwargs):
    torch.manual_seed(0)
    settings = dict(in_channels=6, norm_cfg=BN) | kwargs
    return SimpleFeaturePyramid(**settings)


def kinds(neck):
    """Names of the layers of each scale."""
    return [
        [type(m).__name__ for m in scale.modules() if not list(m.children())]
        for scale in neck.children()
    ]


UP, POOL, SAME = 'ConvTranspose2d', 'MaxPool2d', 'Identity'
BETWEEN = ['BatchNorm2d', 'GELU']
PYRAMIDS = {
    16: [[UP, *BETWEEN, UP], [UP], [SAME], [POOL]],
    8: [[UP], [SAME], [POOL], [POOL]],
    4: [[SAME], [POOL], [POOL], [POOL]],
    32: [[UP, *BETWEEN, UP, *BETWEEN, UP], [UP, *BETWEEN, UP], [UP], [SAME]],
}


@pytest.mark.parametrize('stride', PYRAMIDS)
def test_scales_of_each_stride(stride):
    """Layers and sizes; the maps keep their channels."""
    neck = build(stride=stride).eval()
    assert kinds(neck) == PYRAMIDS[stride]
    rows, columns = 64 // stride, 96 // stride
    maps = neck(torch.randn(2, 6, rows, columns))
    assert [tuple(x.shape) for x in maps] == [
        (2, 6, 64 // s, 96 // s) for s in (4, 8, 16, 32)
    ]


@pytest.mark.parametrize(
    ('stride', 'out_strides', 'sizes'),
    [
        (14, (7, 14, 28), [(10, 14), (5, 7), (3, 4)]),
        (16, (16,), [(5, 7)]),
        (16, 8, [(10, 14)]),
        (8, (64,), [(1, 1)]),
    ],
    ids=str,
)
def test_other_strides(stride, out_strides, sizes):
    """Pooling keeps the rest of an odd map."""
    neck = build(stride=stride, out_strides=out_strides)
    maps = neck(torch.randn(2, 6, 5, 7))
    assert [tuple(x.shape[2:]) for x in maps] == sizes
    assert all(x.isfinite().all() for x in maps)


def test_a_map_of_one_token_has_every_scale():
    maps = build().eval()(torch.randn(1, 6, 1, 1))
    assert [x.shape[-1] for x in maps] == [4, 2, 1, 1]


def published(channels):
    """Scales of the published code at patch size 16, by its names."""
    up = (channels, channels, 2, 2)
    return nn.ModuleDict(
        dict(
            fpn1=nn.Sequential(
                nn.ConvTranspose2d(*up),
                nn.SyncBatchNorm(channels),
                nn.GELU(),
                nn.ConvTranspose2d(*up),
            ),
            fpn2=nn.Sequential(nn.ConvTranspose2d(*up)),
            fpn3=nn.Identity(),
            fpn4=nn.MaxPool2d(2, 2),
        )
    )


def test_numbers_and_names_of_the_published_scales():
    """Its state loads strictly and gives its numbers on even maps."""
    torch.manual_seed(0)
    wanted, neck = published(6).eval(), build(norm_cfg=dict(type='SyncBN'))
    neck.load_state_dict(wanted.state_dict(), strict=True)
    maps = [torch.randn(2, 6, 4, 6) for _ in range(4)]
    got = neck.eval()(maps)
    for scale, x, y in zip(wanted.values(), maps, got, strict=True):
        assert torch.equal(scale(x), y)


def test_one_map_serves_every_scale():
    neck, x = build().eval(), torch.randn(1, 6, 4, 4)
    several = neck([x] * 4)
    for single in (neck(x), neck((x,))):
        for a, b in zip(single, several, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ('norm_cfg', 'name'),
    [
        (dict(type='BN'), 'BatchNorm2d'),
        (dict(type='SyncBN', requires_grad=True), 'SyncBatchNorm'),
        (ConfigDict(type='LN2d', eps=1e-6), 'LayerNorm2d'),
        (dict(type='GN', num_groups=2), 'GroupNorm'),
        (None, 'Identity'),
    ],
    ids=str,
)
def test_any_norm_from_both_toolkits(scope, norm_cfg, name):
    """``LN2d`` too, which only MMPretrain has; the argument is not changed."""
    given = None if norm_cfg is None else dict(norm_cfg)
    neck = build(norm_cfg=norm_cfg)
    assert type(neck.fpn1[1]).__name__ == name
    assert norm_cfg == given
    maps = neck(torch.randn(2, 6, 4, 4))
    sum(x.square().sum() for x in maps).backward()
    assert all(p.grad is not None for p in neck.parameters())


BAD_ARGUMENTS = [
    (dict(out_strides=(4, 12)), r'out_strides must be 16.*\(4, 8, 16, 32\)'),
    (dict(out_strides=(16, 48)), 'out_strides must be 16'),
    (dict(stride=14), r'out_strides must be 14.*\(7, 14, 28\), got'),
    (dict(out_strides=()), 'out_strides must be'),
    (dict(out_strides=(0,)), 'out_strides must be'),
    (dict(stride=0), 'stride must be a positive int, got 0'),
    (dict(in_channels=-1), 'in_channels must be a positive int, got -1'),
    (dict(norm_cfg=dict(type='LN3d')), "norm_cfg must be .*'LN3d'"),
]


@pytest.mark.parametrize(('kwargs', 'message'), BAD_ARGUMENTS)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_bad_maps():
    neck, x = build(), torch.randn(2, 6, 4, 4)
    with pytest.raises(ValueError, match=r'out_indices must .* 1 map, or 4'):
        neck([x, x])
    with pytest.raises(
        ValueError, match=r'in_channels is 6, got .* 5 channel'
    ):
        neck([x, x[:, :5], x, x])
    with pytest.raises(ValueError, match=r"out_type to 'featmap'.*2, 17, 6"):
        neck([torch.randn(2, 17, 6)])


# inside a segmentor


def head(kind, channels, **kwargs):
    settings = dict(
        type=kind,
        in_channels=channels,
        channels=8,
        num_classes=3,
        norm_cfg=BN,
    )
    return settings | kwargs


UPER = head('UPerHead', [8] * 4, in_index=[0, 1, 2, 3], pool_scales=(1, 2))
AUXILIARY = head('FCNHead', 8, in_index=2, num_convs=1, concat_input=False)
SEGMENTER = dict(
    type='SegmenterMaskTransformerHead',
    in_channels=8,
    channels=8,
    num_classes=3,
    num_layers=1,
    num_heads=2,
    embed_dims=8,
)
HEADS = {
    'uper': dict(decode_head=UPER, auxiliary_head=AUXILIARY),
    'fcn': dict(
        decode_head=head(
            'FCNHead',
            [8] * 4,
            in_index=[0, 1, 2, 3],
            input_transform='resize_concat',
        )
    ),
    'segmenter': dict(decode_head=SEGMENTER),
}


def segmentor(heads, backbone=None, neck=None):
    """A tiny EncoderDecoder with the neck."""
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS

    init_default_scope('mmseg')
    torch.manual_seed(0)
    neck = dict(
        type='mmstabvim.SimpleFeaturePyramid', in_channels=8, norm_cfg=BN
    ) | (neck or {})
    if heads is HEADS['segmenter']:
        neck['out_strides'] = 16
    cfg = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 96)),
        backbone=dict(
            type='mmstabvim.VisionMamba',
            arch=ARCH,
            img_size=(64, 96),
            cls_token=None,
            out_type='featmap',
            out_indices=[0, 1, 2, 3],
        )
        | (backbone or {}),
        neck=neck,
        test_cfg=ConfigDict(mode='whole'),
        **heads,
    )
    if neck.get('out_strides') == 16:
        cfg['backbone']['out_indices'] = [3]
    try:
        return MODELS.build(cfg)
    finally:
        init_default_scope('mmpretrain')


def batch(height, width):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    labels = torch.randint(0, 3, (1, height, width))
    sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
    sample.set_metainfo(
        dict(ori_shape=(height, width), img_shape=(height, width))
    )
    return dict(inputs=[image, image.flip(2)], data_samples=[sample] * 2)


@pytest.mark.parametrize('heads', HEADS)
def test_heads_learn_from_the_neck(heads):
    """Every weight that learns has a gradient; odd sizes are predicted."""
    model = segmentor(HEADS[heads])
    check_segmentor(model)
    data = model.data_preprocessor(batch(64, 96), training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    model.eval()
    for size in ((64, 96), (45, 71)):
        data = model.data_preprocessor(batch(*size))
        with torch.no_grad():
            (result, _) = model(**data, mode='predict')
        assert result.seg_logits.data.shape == (3, *size)
        assert result.seg_logits.data.isfinite().all()


MISMATCHES = [
    (dict(backbone=dict(out_indices=[1, 3])), 'out_indices must .*or 4.*2'),
    (dict(backbone=dict(out_type='raw')), "out_type must be 'featmap'.*raw"),
    (dict(backbone=dict(patch_size=8)), "neck's stride must be 8.*got 16"),
    (dict(neck=dict(in_channels=16)), "neck's in_channels must be 8.*got 16"),
    (
        dict(neck=dict(out_strides=(4, 8)), backbone=dict(out_indices=-1)),
        r'decode_head: in_index must be below 2.*out_strides \(4, 8\)',
    ),
    (
        dict(heads=dict(decode_head=head('FCNHead', 8, in_index=4))),
        r'decode_head: in_index must be below 4.*got 4',
    ),
    (
        dict(heads=HEADS['uper'] | dict(auxiliary_head=head('FCNHead', 16))),
        r'auxiliary_head: in_channels must be \[8\].*got \[16\]',
    ),
    (
        dict(
            heads=HEADS['uper']
            | dict(auxiliary_head=[AUXILIARY, head('FCNHead', 8, in_index=9)])
        ),
        'auxiliary_head: in_index must be below 4',
    ),
]


@pytest.mark.parametrize(('kwargs', 'message'), MISMATCHES)
def test_what_does_not_match_is_found_before_training(kwargs, message):
    model = segmentor(**dict(heads=HEADS['uper']) | kwargs)
    for wrapped in (model, nn.DataParallel(model)):
        with pytest.raises(ValueError, match=message):
            check_segmentor(wrapped)


def test_heads_without_a_neck_are_checked_against_the_backbone():
    model = segmentor(HEADS['uper'], backbone=dict(out_indices=-1))
    model.neck = None
    with pytest.raises(ValueError, match=r'below 1.*out_indices \[3\]'):
        check_segmentor(model)


def test_other_models_are_not_judged():
    model = segmentor(HEADS['uper'], backbone=dict(out_indices=[1, 3]))
    model.neck = nn.Identity()
    check_segmentor(model)
    model.backbone = nn.Identity()
    check_segmentor(model)
    check_segmentor(nn.Linear(2, 2))
