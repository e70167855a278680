_base_ = './vim-tiny-p16_8xb128-full-none_in1k.py'

default_hooks = dict(
    # literal: the radius of every matrix is at most 1 per step
    sn=dict(type='mmstabvim.SpectralNormalizationHook', rho_max=1.0),
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
    sp=dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
)
