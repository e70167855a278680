# Vim-tiny, fine-tuned on images of your own: a folder for each class, in
# train/, val/ and test/ of a data_root (docs/tutorial_classification.md). The
# rates are a usual start for small data sets; they were not tuned.
_base_ = [
    '../_base_/models/vim_tiny_p16.py',
    '../_base_/datasets/imagenet_bs128_vim_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_vim.py',
    '../_base_/default_runtime.py',
]

# one class, one label: no mixture of images, which small data sets do not need
model = dict(backbone=dict(drop_path_rate=0.1), train_cfg=None)

# the folders decide, and model.head.num_classes
data_preprocessor = dict(num_classes=None)
train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='data',
        data_prefix='train',
        pipeline={{_base_.train_pipeline}},
    ),
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    drop_last=False,
)
val_dataloader = dict(
    batch_size=32,
    num_workers=2,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='data',
        data_prefix='val',
        pipeline={{_base_.test_pipeline}},
    ),
)
test_dataloader = dict(
    batch_size=32,
    num_workers=2,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root='data',
        data_prefix='test',
        pipeline={{_base_.test_pipeline}},
    ),
)
val_evaluator = dict(topk=(1,))
test_evaluator = dict(topk=(1,))

optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-2,
        by_epoch=True,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-6,
        by_epoch=True,
        begin=1,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=20)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(max_keep_ckpts=1, save_best='auto'),
)
auto_scale_lr = dict(base_batch_size=32)
