# Spectral normalization.
default_hooks = dict(
    # literal: the radius of every matrix is at most 1 per step
    sn=dict(type='mmstabvim.SpectralNormalizationHook', rho_max=1.0),
)
