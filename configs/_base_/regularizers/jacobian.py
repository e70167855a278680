# Jacobian regularization, one random projection per step on 16 images.
default_hooks = dict(
    jacobian=dict(
        type='mmstabvim.StabilityLossHook',
        loss=dict(type='mmstabvim.JacobianLoss', loss_weight=0.01, samples=16),
    ),
)
