# for 32 x 32 images: 64 patches and the class token
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmstabvim.VisionMamba',
        arch=dict(embed_dims=64, num_layers=3, d_state=8),
        img_size=32,
        patch_size=4,
    ),
    neck=None,
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
        ),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
    ),
)
