# `python tools/ablation.py run configs/ablation/cifar10.py`: eight
# combinations of stabilizers on three state matrices, bounds on the spectra of
# weights, and initializations of full state matrices.
title = 'Stabilizers on CIFAR-10'
notes = [
    'weight_sn bounds the spectral norm of each layer, srn its stable rank.',
]
metric = 'accuracy/top1'
baseline = dict(stabilizers='none')
seeds = [0]

_config = '../vim/vim-micro-p4_1xb128-200e_cifar10.py'
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
_weight_sn = '../_base_/stabilizers/weight_sn.py'
_srn = '../_base_/stabilizers/srn.py'
_weight_rules = {
    'weight_sn': _weight_sn,
    'srn': _srn,
    'weight_sn_srn': [_weight_sn, _srn],
}
_inits = {
    name: {'model.backbone.state_matrix.init': name}
    for name in ('s4d_lin', 's4d_inv', 's4d_legs', 'hippo', 'ptd')
}

groups = [
    dict(
        configs=_config,
        labels=dict(
            matrix=_matrices, init='s4d_real', stabilizers=_stabilizers
        ),
    ),
    dict(
        configs=_config,
        labels=dict(
            matrix='neg_exp', init='s4d_real', stabilizers=_weight_rules
        ),
    ),
    dict(
        configs=_config,
        labels=dict(
            matrix={'full': _matrices['full']},
            init=_inits,
            stabilizers={'none': _stabilizers['none']},
        ),
    ),
]
