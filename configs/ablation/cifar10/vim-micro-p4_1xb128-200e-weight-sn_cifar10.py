_base_ = [
    '../../vim/vim-micro-p4_1xb128-200e_cifar10.py',
    '../../_base_/stabilizers/weight_sn.py',
]
