# `python tools/ablation.py run configs/ablation/digits.py --jobs 2`:
# handwritten digits, eight combinations of stabilizers on three state
# matrices, and on full ones with the stabilizers in the forward pass as well;
# three seeds.
title = 'Stabilizers on handwritten digits'
notes = [
    'Clamping in place leaves nothing for a penalty with a larger threshold '
    'to do: ec_sp is ec, unless both act in the forward pass (reparam).',
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

_matrices = {
    'neg_exp': {},
    'signed': {'model.backbone.state_matrix.type': 'signed'},
    'full': {
        'model.backbone.state_matrix.type': 'full',
        'model.backbone.state_matrix.groups': 4,
    },
}
_stabilizers = {
    name: f'../_base_/stabilizers/{name}.py'
    for name in ('none', 'sn', 'ec', 'sp', 'sn_ec', 'sn_sp', 'ec_sp', 'all')
}
# those that project, here in the forward pass
_reparam = {
    name: [
        fragment,
        {
            f'default_hooks.{key}.mode': 'reparam'
            for key in ('sn', 'ec')
            if key in name.split('_') or name == 'all'
        },
    ]
    for name, fragment in _stabilizers.items()
}

groups = [
    dict(
        configs='../vim/vim-nano-p4_1xb64-20e_digits.py',
        labels=dict(matrix=_matrices, stabilizers=_stabilizers),
    ),
    dict(
        configs='../vim/vim-nano-p4_1xb64-20e_digits.py',
        labels=dict(
            matrix={'full, reparam': _matrices['full']}, stabilizers=_reparam
        ),
    ),
]
