# Scenes of handwritten digits on a CPU, nothing to download: `make demo-seg`.
_base_ = [
    '../_base_/models/upernet_vim_nano_p4.py',
    '../_base_/datasets/digit_scenes_64x64.py',
    '../_base_/schedules/no_decay.py',
    '../_base_/default_runtime_seg.py',
]

# Most pixels are background, and what is hard is to tell the digits apart.
# Leave the weights out for data with ignored pixels, where MMSegmentation's
# implementation fails with an IndexError.
loss_decode = dict(class_weight=[0.5] + [1.0] * 10)
model = dict(
    decode_head=dict(channels=64, dropout_ratio=0, loss_decode=loss_decode),
    auxiliary_head=dict(dropout_ratio=0, loss_decode=loss_decode),
)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(
        type='AdamW',
        lr=6e-3,
        weight_decay=0.05,
        eps=1e-8,
        betas=(0.9, 0.98),
        fused=True,
    ),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR',
        eta_min=3e-5,
        by_epoch=False,
        begin=200,
        end=2200,
    ),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=2200, val_interval=550)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(checkpoint=dict(interval=550))

# `--auto-scale-lr` scales the learning rate from this total batch size
auto_scale_lr = dict(base_batch_size=8)
