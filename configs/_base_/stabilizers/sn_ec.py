# Spectral normalization and eigenvalue clamping.
custom_hooks = [
    # literal: the radius of every matrix is at most 1 per step
    dict(type='mmstabvim.SpectralNormalizationHook', rho_max=1.0),
    dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
]
