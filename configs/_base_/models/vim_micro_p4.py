# for 32 x 32 images: 64 patches and the class token
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmstabvim.VisionMamba',
        arch=dict(embed_dims=128, num_layers=12),
        img_size=32,
        patch_size=4,
        drop_path_rate=0.1,
    ),
    neck=None,
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=128,
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
        ),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
    ),
    train_cfg=dict(
        # one of the two for each batch, with equal probability
        augments=[
            dict(type='Mixup', alpha=0.8),
            dict(type='CutMix', alpha=1.0),
        ]
    ),
)
