# All three stabilizers.
custom_hooks = [
    # literal: the radius of every matrix is at most 1 per step
    dict(type='mmstabvim.SpectralNormalizationHook', rho_max=1.0),
    dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
    dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
]
