# Vim-tiny with UPerNet: batch, learning rate, weight decay, schedule and test
# windows as published (there on 4 GPUs with 8 images each). Features are the
# normalised residual stream, the learning rate really decays by depth, and
# what should not decay does not; `-official` has it as it was.
_base_ = [
    '../_base_/models/upernet_vim_tiny_p16.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/seg_bs32_adamw_60k.py',
    '../_base_/default_runtime_seg.py',
]

default_hooks = dict(checkpoint=dict(interval=5000, save_best='mIoU'))
