_base_ = './vim-tiny-p16_upernet_8xb4-60k-full-none_ade20k-512x512.py'

default_hooks = dict(
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
)
