# Soft bound on the spectral norms of a Vision Mamba classifier's weights.
default_hooks = dict(
    spectral_constraint=dict(
        type='mmstabvim.StabilityLossHook',
        loss=dict(
            type='mmstabvim.SpectralConstraintLoss',
            layers=[
                'patch_embed',
                'in_proj',
                'conv1d',
                'x_proj',
                'dt_proj',
                'out_proj',
                'head',
            ],
            max_norm=1.0,
            loss_weight=0.01,
        ),
    ),
)
