_base_ = [
    './vim-nano-p4_1xb64-10e_cifar10-subset.py',
    '../../_base_/stabilizers/none.py',
]
model = dict(
    backbone=dict(state_matrix=dict(type='full', groups=4, init='hippo')),
)
