# `python tools/ablation.py run configs/ablation/stress.py --jobs 2`: long
# sequences (257 tokens from patches of 2 pixels), bfloat16, no clipping of
# gradients, and a ladder of learning rates, to make training diverge.
title = 'Where training diverges'
metric = 'accuracy/top1'
baseline = dict(stabilizers='none')
# a finite run below twice the rate of guessing has learnt nothing
collapse_below = 20
seeds = [0, 1]
precisions = ['bf16']
lrs = [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
cfg_options = {
    'model.backbone.patch_size': 2,
    'optim_wrapper.clip_grad': None,
    'train_cfg.max_epochs': 2,
    'train_cfg.val_interval': 2,
    # one epoch up to the learning rate, one down from it
    'param_scheduler.0.end': 1,
    'param_scheduler.1.begin': 1,
    'default_hooks.checkpoint.interval': 100,
    'default_hooks.stability.interval': 5,
    # only what is not finite counts as divergence
    'default_hooks.divergence.spike_factor': None,
}

_matrices = {
    'signed': {'model.backbone.state_matrix.type': 'signed'},
    'full': {
        'model.backbone.state_matrix.type': 'full',
        'model.backbone.state_matrix.groups': 4,
    },
}
_stabilizers = {
    name: f'../_base_/stabilizers/{name}.py'
    for name in ('none', 'sn', 'ec', 'sp', 'all')
}

groups = [
    dict(
        configs='../vim/vim-nano-p4_1xb64-20e_digits.py',
        labels=dict(matrix=_matrices, stabilizers=_stabilizers),
    ),
]
