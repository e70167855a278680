# Weight decay acts on matrices and convolution kernels only: not on the state
# matrix (A_log or whatever a parametrization holds), position embedding and
# class tokens, nor on anything one-dimensional (D, norms, biases). The three
# multipliers are ignored where a custom key matches.
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,  # RMSNorm and D are no mmengine "norm" layers
        custom_keys={
            '.state_matrix': dict(decay_mult=0.0),
            '.pos_embed': dict(decay_mult=0.0),
            '.cls_token': dict(decay_mult=0.0),
        },
    ),
)
