_base_ = [
    '../../upernet/vim-nano-p4_upernet_1xb8-2k_digit-scenes-64x64.py',
    '../../_base_/stabilizers/sp.py',
]
model = dict(backbone=dict(state_matrix=dict(type='signed')))
