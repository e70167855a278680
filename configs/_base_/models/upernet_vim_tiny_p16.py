# UPerNet on four depths of Vim-tiny, with the neck, the heads and the widths
# of the published segmentation model, for 150 classes.
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=(512, 512),  # smaller images are padded, in training
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='mmstabvim.VisionMamba',
        arch='tiny',
        img_size=512,
        patch_size=16,
        cls_token=None,
        out_type='featmap',
        out_indices=[5, 11, 17, 23],
        drop_path_rate=0.1,
    ),
    neck=dict(
        type='mmstabvim.SimpleFeaturePyramid',
        in_channels=192,
        stride=16,
        out_strides=(4, 8, 16, 32),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[192, 192, 192, 192],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=192,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=192,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4),
    ),
    train_cfg={},
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
