_base_ = './seg_bs32_adamw_60k.py'

optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=500,
        end=8000,
    ),
]

train_cfg = dict(max_iters=8000, val_interval=800)

# `--auto-scale-lr` scales the learning rate from this total batch size
auto_scale_lr = dict(base_batch_size=8)
