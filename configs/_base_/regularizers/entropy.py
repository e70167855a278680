# Penalty on concentrated singular values of the logits' Jacobian.
default_hooks = dict(
    entropy=dict(
        type='mmstabvim.StabilityLossHook',
        loss=dict(type='mmstabvim.EntropyLoss', loss_weight=0.1, samples=2),
    ),
)
