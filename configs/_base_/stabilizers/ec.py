# Eigenvalue clamping.
custom_hooks = [
    dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
]
