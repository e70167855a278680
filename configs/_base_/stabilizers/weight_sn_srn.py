# Spectral norms of the weights of a classifier, then their stable ranks.
custom_hooks = [
    dict(
        type='mmstabvim.WeightSpectralNormHook',
        layers=[
            'patch_embed',
            'in_proj',
            'conv1d',
            'x_proj',
            'dt_proj',
            'out_proj',
            'head',
        ],
        # literal: no layer enlarges a difference
        max_norm=1.0,
    ),
    dict(
        type='mmstabvim.StableRankHook',
        # shares of the largest possible stable rank
        targets=dict(
            in_proj=0.3,
            x_proj=0.3,
            dt_proj=0.3,
            out_proj=0.3,
            conv1d=0.5,
        ),
    ),
]
