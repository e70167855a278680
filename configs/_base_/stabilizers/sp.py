# Stability penalty.
default_hooks = dict(
    sp=dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
)
