"""The backbone inside MMSegmentation's and MMPretrain's models."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope

import mmstabvim  # noqa: F401  lets mmseg be imported

ARCH = dict(embed_dims=16, num_layers=3, d_state=4)


@pytest.fixture
def segmentor():
    """An EncoderDecoder with two maps of the backbone and an FCN head."""
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS

    init_default_scope('mmseg')
    model = MODELS.build(
        dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 48)),
            backbone=dict(
                type='mmstabvim.VisionMamba',
                arch=ARCH,
                img_size=(32, 48),
                patch_size=8,
                cls_token=None,
                out_type='featmap',
                out_indices=[0, 2],
            ),
            decode_head=dict(
                type='FCNHead',
                in_channels=[16, 16],
                in_index=[0, 1],
                input_transform='resize_concat',
                channels=8,
                num_classes=4,
                norm_cfg=dict(type='BN'),
            ),
            test_cfg=ConfigDict(mode='whole'),
        )
    )
    model.init_weights()
    yield model
    init_default_scope('mmpretrain')


def batch(height, width):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    sample = SegDataSample(
        gt_sem_seg=PixelData(data=torch.randint(0, 4, (1, height, width)))
    )
    sample.set_metainfo(
        dict(ori_shape=(height, width), img_shape=(height, width))
    )
    return dict(inputs=[image, image.flip(2)], data_samples=[sample, sample])


def test_segmentor_learns(segmentor):
    """Its loss falls on one batch, and every parameter has a gradient."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(segmentor.parameters(), lr=1e-2)
    data = batch(32, 48)
    losses = []
    for _ in range(8):
        prepared = segmentor.data_preprocessor(data, training=True)
        loss, _ = segmentor.parse_losses(segmentor(**prepared, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in segmentor.backbone.parameters())


@pytest.mark.parametrize('size', [(32, 48), (45, 71), (16, 100)])
def test_segmentor_predicts_at_any_size(segmentor, size):
    segmentor.eval()
    data = segmentor.data_preprocessor(batch(*size))
    with torch.no_grad():
        result = segmentor(**data, mode='predict')[0]
    assert result.pred_sem_seg.data.shape == (1, *size)
    assert result.seg_logits.data.isfinite().all()


def test_classifier_features_and_loss():
    """``extract_feat``, loss and prediction of an ImageClassifier."""
    import mmpretrain.models  # noqa: F401
    from mmpretrain.registry import MODELS
    from mmpretrain.structures import DataSample

    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='mmstabvim.VisionMamba',
                arch=ARCH,
                img_size=32,
                patch_size=8,
                out_indices=[1, 2],
            ),
            head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
        )
    )
    model.init_weights()
    image = torch.randn(2, 3, 32, 32)
    features = model.extract_feat(image)
    assert [tuple(x.shape) for x in features] == [(2, 16), (2, 16)]
    samples = [DataSample().set_gt_label(i) for i in (0, 2)]
    loss = model(image, samples, mode='loss')['loss']
    assert loss.item() == pytest.approx(1.1, abs=0.2)  # about ln 3
    model.eval()
    assert len(model(image, samples, mode='predict')) == 2
