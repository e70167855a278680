# Vim-small (arXiv:2401.09417), trained as published, except for the state
# matrix and the initialisation: see `vim-tiny-p16_8xb128_in1k.py`.
_base_ = [
    '../_base_/models/vim_small_p16.py',
    '../_base_/datasets/imagenet_bs128_vim_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_vim.py',
    '../_base_/default_runtime.py',
]

# decay 0.99996; validation and test see the averaged weights
default_hooks = dict(ema=dict(type='EMAHook', momentum=4e-5))

train_dataloader = dict(batch_size=64)

optim_wrapper = dict(
    optimizer=dict(lr=1e-3 * 512 / 512, weight_decay=0.05),
)
auto_scale_lr = dict(base_batch_size=512)
