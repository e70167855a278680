_base_ = [
    '../../vim/vim-micro-p4_1xb128-200e_cifar10.py',
    '../../_base_/stabilizers/none.py',
]
model = dict(
    backbone=dict(state_matrix=dict(type='full', groups=4, init='hippo')),
)
