# `python tools/ablation.py run configs/ablation/cifar10_subset.py --jobs 2`:
# eight combinations of stabilizers on full state matrices, three seeds.
title = 'Stabilizers on a subset of CIFAR-10'
metric = 'accuracy/top1'
baseline = dict(stabilizers='none')
seeds = [0, 1, 2]

groups = [
    dict(
        configs='cifar10_subset/vim-nano-p4_1xb64-10e-full-{stabilizers}'
        '_cifar10-subset.py',
        labels=dict(
            matrix='full',
            stabilizers=[
                'none',
                'sn',
                'ec',
                'sp',
                'sn-ec',
                'sn-sp',
                'ec-sp',
                'all',
            ],
        ),
    ),
]
