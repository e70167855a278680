# The published recipe as it ran: each scale gets the output of a mixer, and
# layer decay, which looks for blocks under another name, slows down the
# embeddings only. Weight decay spares what is one-dimensional, but not the
# state matrix and the position embedding.
_base_ = './vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py'

model = dict(backbone=dict(feature='mixer_output', last_layer='none'))

embeddings = dict(lr_mult=0.92**25)
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
