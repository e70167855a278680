# for 64 x 64 images: 256 patches, maps of 16, 8, 4 and 2 pixels a side
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[64.0, 64.0, 64.0],
        bgr_to_rgb=True,
        size=(64, 64),
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='mmstabvim.VisionMamba',
        arch=dict(embed_dims=64, num_layers=3, d_state=8),
        img_size=64,
        patch_size=4,
        cls_token=None,
        out_type='featmap',
        out_indices=[2],
    ),
    neck=dict(
        type='mmstabvim.SimpleFeaturePyramid',
        in_channels=64,
        stride=4,
        out_strides=(4, 8, 16, 32),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[64, 64, 64, 64],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2),
        channels=32,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    # learns to tell classes apart, which the other head alone begins hundreds
    # of iterations later
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=64,
        in_index=1,
        channels=128,
        num_convs=2,
        concat_input=False,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    train_cfg={},
    test_cfg=dict(mode='whole'),
)
