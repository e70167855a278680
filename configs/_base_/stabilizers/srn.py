# Stable rank normalization of the projections and the convolution.
default_hooks = dict(
    srn=dict(
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
)
