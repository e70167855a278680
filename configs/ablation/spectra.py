# `python tools/ablation.py run configs/ablation/spectra.py --jobs 2`: bounds
# on the spectra of weights, and where state matrices start, on handwritten
# digits; three seeds.
title = 'Spectra of weights, and starts of state matrices'
notes = [
    'weight-sn bounds the spectral norm of each layer, srn its stable rank.',
    'On neg_exp the weights are bounded; on full the state matrices start '
    'elsewhere, and plain is s4d_real.',
]
metric = 'accuracy/top1'
baseline = dict(variant='plain')
seeds = [0, 1, 2]
cfg_options = {  # half the demo's epochs
    'train_cfg.max_epochs': 10,
    'train_cfg.val_interval': 10,
    'default_hooks.checkpoint.interval': 10,
    'default_hooks.checkpoint.max_keep_ckpts': 1,
}

_rules = ['weight-sn', 'srn', 'weight-sn-srn']
_inits = ['s4d-lin', 's4d-inv', 's4d-legs', 'hippo', 'ptd']

groups = [
    dict(
        configs='../vim/vim-nano-p4_1xb64-20e_digits.py',
        labels=dict(matrix='neg_exp', variant='plain'),
    ),
    dict(
        configs='digits/vim-nano-p4_1xb64-20e-{variant}_digits.py',
        labels=dict(matrix='neg_exp', variant=_rules),
    ),
    dict(
        configs='digits/vim-nano-p4_1xb64-20e-full-none_digits.py',
        labels=dict(matrix='full', variant='plain'),
    ),
    dict(
        configs='digits/vim-nano-p4_1xb64-20e-full-{variant}_digits.py',
        labels=dict(matrix='full', variant=_inits),
    ),
]
