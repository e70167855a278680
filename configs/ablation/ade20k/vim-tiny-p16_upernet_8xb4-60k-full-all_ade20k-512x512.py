_base_ = './vim-tiny-p16_upernet_8xb4-60k-full-none_ade20k-512x512.py'

default_hooks = dict(
    # literal: the radius of every matrix is at most 1 per step
    sn=dict(type='mmstabvim.SpectralNormalizationHook', rho_max=1.0),
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
    sp=dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
)
