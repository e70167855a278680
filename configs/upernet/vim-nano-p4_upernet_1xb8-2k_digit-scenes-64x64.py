# Scenes of handwritten digits on a CPU, nothing to download: `make demo-seg`.
_base_ = [
    '../_base_/models/upernet_vim_nano_p4.py',
    '../_base_/datasets/digit_scenes_64x64.py',
    '../_base_/schedules/no_decay.py',
    '../_base_/default_runtime_seg.py',
]

# Most pixels are background, and what is hard is to tell the digits apart.
# Leave the weights out for data with ignored pixels: MMSegmentation cannot
# compute them there, and training is refused.
loss_decode = dict(class_weight=[0.5] + [1.0] * 10)
model = dict(
    # without the map of 2 x 2 pixels, which costs time and adds nothing
    neck=dict(out_strides=(4, 8, 16)),
    decode_head=dict(
        in_channels=[64] * 3,
        in_index=[0, 1, 2],
        channels=64,
        dropout_ratio=0,
        loss_decode=loss_decode,
    ),
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
    # decays nothing, but the optimizer has few groups instead of one for each
    # parameter, and takes half the time
    constructor='mmstabvim.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=1.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=200),
    dict(
        type='CosineAnnealingLR',
        eta_min=3e-5,
        by_epoch=False,
        begin=200,
        end=2000,
    ),
]

train_cfg = dict(type='IterBasedTrainLoop', max_iters=2000, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(checkpoint=dict(interval=500))

# `--auto-scale-lr` scales the learning rate from this total batch size
auto_scale_lr = dict(base_batch_size=8)
