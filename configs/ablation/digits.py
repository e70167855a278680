# `python tools/ablation.py run configs/ablation/digits.py --jobs 2`:
# handwritten digits, eight combinations of stabilizers on three state
# matrices, and on full matrices with the stabilizers in the forward pass as
# well, three seeds.
title = 'Stabilizers on handwritten digits'
metric = 'accuracy/top1'
baseline = dict(stabilizers='none')
seeds = [0, 1, 2]
cfg_options = {  # half the demo's epochs
    'train_cfg.max_epochs': 10,
    'train_cfg.val_interval': 10,
    'default_hooks.checkpoint.interval': 10,
    'default_hooks.checkpoint.max_keep_ckpts': 1,
    'default_hooks.stability.interval': 20,
}

_combinations = ['none', 'sn', 'ec', 'sp', 'sn-ec', 'sn-sp', 'ec-sp', 'all']
_config = 'digits/vim-nano-p4_1xb64-20e-{}-{}_digits.py'
# the stabilizers that project, by their place among a config's hooks
_projecting = dict(sn=1, ec=1, all=2, **{'sn-ec': 2, 'sn-sp': 1, 'ec-sp': 1})

groups = [
    dict(
        configs=_config.format(_matrix.replace('_', ''), '{stabilizers}'),
        labels=dict(matrix=_matrix, stabilizers=_combinations),
    )
    for _matrix in ('neg_exp', 'signed', 'full')
] + [
    dict(
        configs=_config.format('full', _combination),
        labels=dict(matrix='full, reparam', stabilizers=_combination),
        cfg_options={
            f'custom_hooks.{_i}.mode': 'reparam' for _i in range(_count)
        },
    )
    for _combination, _count in _projecting.items()
]
