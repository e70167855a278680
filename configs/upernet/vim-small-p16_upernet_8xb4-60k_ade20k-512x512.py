# Vim-small with UPerNet, published learning rates and weight decay: see
# `vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py`.
_base_ = [
    '../_base_/models/upernet_vim_small_p16.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/seg_bs32_adamw_60k.py',
    '../_base_/default_runtime_seg.py',
]

default_hooks = dict(checkpoint=dict(interval=5000, save_best='mIoU'))

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
