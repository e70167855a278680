# `python tools/ablation.py run configs/ablation/spectra.py --jobs 2`: bounds
# on the spectra of weights, and initializations of state matrices, on
# handwritten digits and on a subset of CIFAR-10; three seeds.
title = 'Spectra of weights, and initializations of state matrices'
notes = [
    'weight_sn bounds the spectral norm of each layer, srn its stable rank.',
    'On neg_exp the weights are bounded; on full the initialization of the '
    'state matrices differs, and plain is s4d_real.',
]
metric = 'accuracy/top1'
baseline = dict(variant='plain')
seeds = [0, 1, 2]
cfg_options = {  # half the epochs of the digits demo
    'train_cfg.max_epochs': 10,
    'train_cfg.val_interval': 10,
    'default_hooks.checkpoint.interval': 10,
    'default_hooks.checkpoint.max_keep_ckpts': 1,
}

_configs = {
    'digits': '../vim/vim-nano-p4_1xb64-20e_digits.py',
    'CIFAR-10 subset': '../vim/vim-nano-p4_1xb64-10e_cifar10-subset.py',
}
_full = {
    'model.backbone.state_matrix.type': 'full',
    'model.backbone.state_matrix.groups': 4,
}
_weight_sn = '../_base_/stabilizers/weight_sn.py'
_srn = '../_base_/stabilizers/srn.py'
_rules = {
    'plain': {},
    'weight_sn': _weight_sn,
    'srn': _srn,
    'weight_sn_srn': [_weight_sn, _srn],
}
_inits = {
    'plain': {},
    **{
        name: {'model.backbone.state_matrix.init': name}
        for name in ('s4d_lin', 's4d_inv', 's4d_legs', 'hippo', 'ptd')
    },
}

groups = [
    dict(
        configs=_config,
        labels=dict(data=_data, matrix=_matrix, variant=_variants),
    )
    for _data, _config in _configs.items()
    for _matrix, _variants in (
        ('neg_exp', _rules),
        ({'full': _full}, _inits),
    )
]
