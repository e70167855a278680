# Vim-small with UPerNet on the usual long schedule. Not measured.
_base_ = [
    '../_base_/models/upernet_vim_small_p16.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/seg_bs16_adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]

train_dataloader = dict(batch_size=2)

default_hooks = dict(checkpoint=dict(interval=16000, save_best='mIoU'))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.95))
