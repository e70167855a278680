# Vim-base with UPerNet. No recipe of it was published: learning rates and
# weight decay are those of Vim-small. Not measured.
_base_ = [
    '../_base_/models/upernet_vim_base_p16.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/seg_bs32_adamw_60k.py',
    '../_base_/default_runtime_seg.py',
]

default_hooks = dict(checkpoint=dict(interval=5000, save_best='mIoU'))

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
