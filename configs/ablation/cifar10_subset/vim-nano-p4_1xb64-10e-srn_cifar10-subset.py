_base_ = [
    './vim-nano-p4_1xb64-10e_cifar10-subset.py',
    '../../_base_/stabilizers/srn.py',
]
