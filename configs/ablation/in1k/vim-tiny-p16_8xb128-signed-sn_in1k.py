_base_ = [
    '../../vim/vim-tiny-p16_8xb128_in1k.py',
    '../../_base_/stabilizers/sn.py',
]
model = dict(backbone=dict(state_matrix=dict(type='signed')))
