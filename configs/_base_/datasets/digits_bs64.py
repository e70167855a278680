# scikit-learn's handwritten digits: nothing to download
dataset_type = 'mmstabvim.Digits'
data_preprocessor = dict(
    num_classes=10,
    # of the enlarged training images, whose three channels are equal
    mean=[79.6, 79.6, 79.6],
    std=[90.8, 90.8, 90.8],
    to_rgb=False,
)

train_pipeline = [
    dict(type='NumpyToPIL'),
    dict(
        type='torchvision/RandomAffine',
        degrees=10,
        translate=(0.1, 0.1),
        scale=(0.9, 1.1),
        interpolation='bilinear',
    ),
    dict(type='PILToNumpy'),
    dict(type='PackInputs'),
]

test_pipeline = [dict(type='PackInputs')]

# no worker processes: a sample takes less time than its transport
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    dataset=dict(type=dataset_type, split='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)

val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    dataset=dict(type=dataset_type, split='test', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
