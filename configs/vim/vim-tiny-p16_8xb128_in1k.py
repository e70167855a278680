# Vim-tiny (arXiv:2401.09417), trained as published, except that the state
# matrix is kept out of weight decay and the initialisation is the sound one.
# `vim-tiny-p16_8xb128-official_in1k.py` does neither.
_base_ = [
    '../_base_/models/vim_tiny_p16.py',
    '../_base_/datasets/imagenet_bs128_vim_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_vim.py',
    '../_base_/default_runtime.py',
]

# decay 0.99996; validation and test see the averaged weights
default_hooks = dict(ema=dict(type='EMAHook', momentum=4e-5))
