# `python tools/ablation.py run configs/ablation/camvid.py`:
# eight combinations of stabilizers on three state matrices.
title = 'Stabilizers on CamVid'
metric = 'mIoU'
more_metrics = ['aAcc', 'IoU/*']
baseline = dict(stabilizers='none')
seeds = [0]

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

groups = [
    dict(
        configs='../upernet/vim-nano-p4_upernet_1xb4-2k_camvid-360x480.py',
        labels=dict(matrix=_matrices, stabilizers=_stabilizers),
    ),
]
