# Spectral norms of the weights of a classifier.
default_hooks = dict(
    weight_sn=dict(
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
        # literal: no layer enlarges a difference; 'init' keeps the norms
        # that a pretrained model comes with
        max_norm=1.0,
    ),
)
