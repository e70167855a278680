_base_ = './no_decay.py'

# no gradient clipping and no mixed precision, as published
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(
        type='AdamW',
        lr=5e-4 * 1024 / 512,  # linear in the total batch size
        weight_decay=0.1,
        eps=1e-8,
        betas=(0.9, 0.999),
    ),
)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,  # from 1e-6
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5),
]

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = {}
test_cfg = {}

# `--auto-scale-lr` scales the learning rate from this total batch size
auto_scale_lr = dict(base_batch_size=1024)
