# A small model for 32 x 32 images, from scratch. Accuracy not measured.
_base_ = [
    '../_base_/models/vim_micro_p4.py',
    '../_base_/datasets/cifar10_bs128.py',
    '../_base_/schedules/cifar_bs128_adamw_200e.py',
    '../_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(interval=5, save_best='auto'))
