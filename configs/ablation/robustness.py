# `python tools/ablation.py run configs/ablation/robustness.py --jobs 2`, then
# `python tools/analysis_tools/eval_robustness.py work_dirs/ablation/robustness
# --amplitude 0.5 --frequencies 17 --samples 300` (20 to 30 s of CPU a model):
# three starts of full state matrices, three seeds, on digits and on a subset
# of CIFAR-10, and what Fourier modes do to the trained models.
title = 'Where the state matrices start, and Fourier modes'
notes = [
    'All state matrices are full, so the starts differ in nothing but the '
    'eigenvalues and eigenvectors; no stabilizer is at work.',
    'These are the scores on clean images; tools/analysis_tools/'
    'eval_robustness.py disturbs them.',
]
metric = 'accuracy/top1'
baseline = dict(init='s4d_real')
seeds = [0, 1, 2]
cfg_options = {
    'train_cfg.max_epochs': 10,
    'train_cfg.val_interval': 10,
    'default_hooks.checkpoint.interval': 10,
    'default_hooks.checkpoint.max_keep_ckpts': 1,
}

_inits = {
    name: {
        'model.backbone.state_matrix.type': 'full',
        'model.backbone.state_matrix.groups': 4,
        'model.backbone.state_matrix.init': name,
    }
    for name in ('s4d_real', 's4d_legs', 'ptd')
}

groups = [
    dict(
        configs='../vim/vim-nano-p4_1xb64-20e_digits.py',
        labels=dict(data='digits', init=_inits),
    ),
    dict(
        configs='../vim/vim-nano-p4_1xb64-10e_cifar10-subset.py',
        labels=dict(data='CIFAR-10 subset', init=_inits),
    ),
]
