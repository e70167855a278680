# A small Vim on 400 images of each class of CIFAR-10, for studies on a CPU:
# ten epochs of 62 steps. It is far from converged; compare runs with it, not
# with other models.
_base_ = [
    '../_base_/models/vim_nano_p4.py',
    '../_base_/datasets/cifar10_subset_bs64.py',
    '../_base_/schedules/digits_bs64_adamw_20e.py',
    '../_base_/default_runtime.py',
]

train_cfg = dict(max_epochs=10, val_interval=10)
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=1))
