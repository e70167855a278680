# Spectral normalization and eigenvalue clamping.
default_hooks = dict(
    # literal: the radius of every matrix is at most 1 per step
    sn=dict(type='mmstabvim.SpectralNormalizationHook', rho_max=1.0),
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
)
