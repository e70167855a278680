# CamVid at half its size on a CPU: half an hour of one core or less. The
# backbone is that of `ablation/cifar10_subset.py`, from whose checkpoints it
# can start:
# `--cfg-options model.backbone.init_cfg.type=Pretrained
# model.backbone.init_cfg.prefix=backbone.
# model.backbone.init_cfg.checkpoint=CHECKPOINT`
_base_ = [
    '../_base_/models/upernet_vim_nano_p4.py',
    '../_base_/datasets/camvid_180x240.py',
    '../_base_/schedules/camvid_bs4_adamw_1k.py',
    '../_base_/default_runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        size=(180, 240),
    ),
    backbone=dict(
        img_size=(180, 240),
        state_matrix=dict(type='full', groups=4),
    ),
)

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=500))
