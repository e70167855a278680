_base_ = './vim-tiny-p16_8xb128-full-none_in1k.py'

default_hooks = dict(
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
)
