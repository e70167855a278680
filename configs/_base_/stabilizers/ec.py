# Eigenvalue clamping.
default_hooks = dict(
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
)
