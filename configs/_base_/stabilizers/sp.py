# Stability penalty.
custom_hooks = [
    dict(type='mmstabvim.StabilityLossHook', eps=0.01, reduction='mean'),
]
