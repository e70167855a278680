# `python tools/ablation.py run configs/ablation/cifar10_subset.py --jobs 2`:
# eight combinations of stabilizers on full state matrices, three seeds.
title = 'Stabilizers on a subset of CIFAR-10'
metric = 'accuracy/top1'
baseline = dict(stabilizers='none')
seeds = [0, 1, 2]

_full = {
    'model.backbone.state_matrix.type': 'full',
    'model.backbone.state_matrix.groups': 4,
}
_stabilizers = {
    name: f'../_base_/stabilizers/{name}.py'
    for name in ('none', 'sn', 'ec', 'sp', 'sn_ec', 'sn_sp', 'ec_sp', 'all')
}

groups = [
    dict(
        configs='../vim/vim-nano-p4_1xb64-10e_cifar10-subset.py',
        labels=dict(matrix={'full': _full}, stabilizers=_stabilizers),
    ),
]
