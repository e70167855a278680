# MMSegmentation's FCN with a ResNet-18 of a quarter of the width, from
# scratch: what a small convolutional network reaches in the same iterations.
_base_ = [
    'mmseg::_base_/models/fcn_r50-d8.py',
    '../_base_/datasets/camvid_180x240.py',
    '../_base_/schedules/camvid_bs4_adamw_1k.py',
    '../_base_/default_runtime_seg.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(180, 240)),
    pretrained=None,
    backbone=dict(
        depth=18, stem_channels=16, base_channels=16, norm_cfg=norm_cfg
    ),
    decode_head=dict(
        in_channels=128, channels=32, num_classes=11, norm_cfg=norm_cfg
    ),
    auxiliary_head=dict(
        in_channels=64, channels=16, num_classes=11, norm_cfg=norm_cfg
    ),
)

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=500))
