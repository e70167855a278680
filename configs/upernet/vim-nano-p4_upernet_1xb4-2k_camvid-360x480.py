# CamVid on a CPU, in an hour and a half on one core: 2.4 s of its time for
# an iteration. The backbone is that of
# `vim/vim-nano-p4_1xb64-10e_cifar10-subset.py`, whose
# checkpoints it can start from (docs/segmentation.md). Accuracy not measured.
_base_ = [
    '../_base_/models/upernet_vim_nano_p4.py',
    '../_base_/datasets/camvid_360x480.py',
    '../_base_/schedules/camvid_bs8_adamw_8k.py',
    '../_base_/default_runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        size=(360, 480),
    ),
    backbone=dict(img_size=(360, 480)),
)

train_dataloader = dict(batch_size=4)

optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    # from scratch; below 1 for pre-trained weights
    paramwise_cfg=dict(layer_decay_rate=1.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=100),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=100,
        end=2000,
    ),
]
train_cfg = dict(max_iters=2000, val_interval=500)

default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=500, save_best='mIoU'),
)

# `--auto-scale-lr` scales the learning rate from this total batch size
auto_scale_lr = dict(base_batch_size=4)
