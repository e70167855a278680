# CamVid at half its size (height x width) for small models on a CPU. Masks
# of validation stay whole: predictions are enlarged to them.
_base_ = './camvid_360x480.py'

num_classes = 11
crop_size = (180, 240)  # (height, width), while `scale` is (width, height)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='mmstabvim.CheckSegMap', num_classes=num_classes),
    dict(
        type='RandomResize',
        scale=(240, 180),
        ratio_range=(0.75, 1.5),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(240, 180), keep_ratio=True),
    # after the resizing, so that the mask keeps its size
    dict(type='LoadAnnotations'),
    dict(type='mmstabvim.CheckSegMap', num_classes=num_classes),
    dict(type='PackSegInputs'),
]

train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=test_pipeline),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='mmstabvim.ClassIoUMetric')
test_evaluator = val_evaluator
