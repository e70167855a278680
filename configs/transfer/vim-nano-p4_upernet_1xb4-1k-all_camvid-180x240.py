# The radius of each state matrix stays below the one that it starts with:
# the literal bound of 1 would change pre-trained matrices at once.
_base_ = './vim-nano-p4_upernet_1xb4-1k_camvid-180x240.py'

custom_hooks = [
    dict(type='mmstabvim.SpectralNormalizationHook', rho_max='init'),
    dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
    dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
]
