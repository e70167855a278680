# scenes composed from scikit-learn's handwritten digits: nothing to download
dataset_type = 'mmstabvim.DigitScenes'
num_classes = 11

# no augmentation: no scene comes twice in a short training, and a flipped
# digit is none
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='mmstabvim.CheckSegMap', num_classes=num_classes),
    dict(type='PackSegInputs'),
]
test_pipeline = train_pipeline
# digits have no mirror images, so only sizes vary
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=ratio, keep_ratio=True)
                for ratio in (0.75, 1.0, 1.25)
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='mmstabvim.CheckSegMap', num_classes=num_classes)],
            [dict(type='PackSegInputs')],
        ],
    ),
]

# no worker processes: a sample takes less time than its transport
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type=dataset_type, split='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=dataset_type, split='test', pipeline=test_pipeline),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
