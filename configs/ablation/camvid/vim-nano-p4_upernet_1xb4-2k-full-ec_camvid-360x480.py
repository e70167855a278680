_base_ = [
    '../../upernet/vim-nano-p4_upernet_1xb4-2k_camvid-360x480.py',
    '../../_base_/stabilizers/ec.py',
]
model = dict(
    backbone=dict(state_matrix=dict(type='full', groups=4)),
)
