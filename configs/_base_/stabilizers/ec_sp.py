# Eigenvalue clamping and stability penalty.
custom_hooks = [
    dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
    dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
]
