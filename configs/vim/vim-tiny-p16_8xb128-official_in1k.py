# The published recipe with its accidents: the backward branch starts with a
# zero bias of the step size, and A_log takes part in weight decay.
_base_ = './vim-tiny-p16_8xb128_in1k.py'

model = dict(backbone=dict(init_recipe='official'))

optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={
            '.pos_embed': dict(decay_mult=0.0),
            '.cls_token': dict(decay_mult=0.0),
        },
    ),
)
