_base_ = './vim-nano-p4_1xb64-20e-full-none_digits.py'

default_hooks = dict(
    # literal: the radius of every matrix is at most 1 per step
    sn=dict(type='mmstabvim.SpectralNormalizationHook', rho_max=1.0),
)
