# the long schedule that MMSegmentation has for UPerNet on transformers
# (arXiv:2103.14030), with layer decay as in the short one
_base_ = './seg_bs32_adamw_60k.py'

optim_wrapper = dict(optimizer=dict(lr=6e-5, weight_decay=0.01))

param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500
    ),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=1500,
        end=160000,
    ),
]

train_cfg = dict(max_iters=160000, val_interval=16000)

# `--auto-scale-lr` scales the learning rate from this total batch size
auto_scale_lr = dict(base_batch_size=16)
