_base_ = './vim-tiny-p16_8xb128-full-none_in1k.py'

default_hooks = dict(
    sp=dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
)
