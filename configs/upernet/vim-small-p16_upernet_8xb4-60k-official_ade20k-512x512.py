# The published recipe as it ran: each scale gets the residual stream, not
# normalised; for the accidents of the optimizer see
# `vim-tiny-p16_upernet_8xb4-60k-official_ade20k-512x512.py`. The published
# file also asks for rotary embedding, which the published weights do not have.
_base_ = './vim-small-p16_upernet_8xb4-60k_ade20k-512x512.py'

model = dict(backbone=dict(feature='residual', last_layer='add'))

embeddings = dict(lr_mult=0.95**25)
optim_wrapper = dict(
    constructor='DefaultOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={
            'backbone.pos_embed': embeddings,
            'backbone.patch_embed': embeddings,
            'backbone.patch_embed.projection.bias': dict(
                decay_mult=0.0, **embeddings
            ),
        },
    ),
)
