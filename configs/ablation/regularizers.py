# `python tools/ablation.py run configs/ablation/regularizers.py --jobs 2`:
# three regularizers against plain training on handwritten digits and on a
# subset of CIFAR-10, three seeds. Then
# `python tools/reproduce/sensitivity.py table WORK_DIR`.
title = 'Regularizers of the sensitivity framework'
notes = [
    'Sensitivity of the trained models: tools/reproduce/sensitivity.py table.',
]
metric = 'accuracy/top1'
baseline = dict(regularizer='plain')
seeds = [0, 1, 2]

_regularizers = {
    'plain': {},
    **{
        name: f'../_base_/regularizers/{name}.py'
        for name in ('jacobian', 'spectral_constraint', 'entropy')
    },
}

groups = [
    dict(
        configs='../vim/vim-nano-p4_1xb64-20e_digits.py',
        labels=dict(data='digits', regularizer=_regularizers),
        cfg_options={  # half the demo's epochs
            'train_cfg.max_epochs': 10,
            'train_cfg.val_interval': 10,
            'default_hooks.checkpoint.interval': 10,
            'default_hooks.checkpoint.max_keep_ckpts': 1,
        },
    ),
    dict(
        configs='../vim/vim-nano-p4_1xb64-10e_cifar10-subset.py',
        labels=dict(data='cifar10-subset', regularizer=_regularizers),
    ),
]
