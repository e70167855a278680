# `python tools/ablation.py run configs/ablation/digits.py --jobs 2`:
# handwritten digits, eight combinations of stabilizers on three state
# matrices, and on full ones with the stabilizers in the forward pass as well;
# three seeds.
title = 'Stabilizers on handwritten digits'
notes = [
    'Clamping in place leaves nothing for a penalty with a larger threshold '
    'to do: ec-sp is ec, unless both act in the forward pass (reparam).',
    'On neg_exp the penalty is always zero.',
    'In "full, reparam" none and sp are those of "full", trained again.',
]
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
# how many stabilizers project: they come first among a config's hooks
_projecting = [0, 1, 1, 0, 2, 1, 1, 2]  # of _combinations

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
    for _combination, _count in zip(_combinations, _projecting, strict=True)
]
