_base_ = './vim-nano-p4_1xb64-20e-full-none_digits.py'

default_hooks = dict(
    sp=dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
)
