# Vim-base (arXiv:2401.09417). No recipe of the base model was published: batch
# and learning rate are those of Vim-tiny, weight decay and drop path the
# defaults of the official training script. Not measured.
_base_ = [
    '../_base_/models/vim_base_p16.py',
    '../_base_/datasets/imagenet_bs128_vim_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_vim.py',
    '../_base_/default_runtime.py',
]

# decay 0.99996; validation and test see the averaged weights
default_hooks = dict(ema=dict(type='EMAHook', momentum=4e-5))

optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
