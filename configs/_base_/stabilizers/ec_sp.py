# Eigenvalue clamping and stability penalty.
default_hooks = dict(
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
    sp=dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
)
