_base_ = './vim-nano-p4_1xb64-20e-full-none_digits.py'

default_hooks = dict(
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
)
