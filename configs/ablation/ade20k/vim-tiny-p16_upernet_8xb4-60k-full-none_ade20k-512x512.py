_base_ = '../../upernet/vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py'

model = dict(backbone=dict(state_matrix=dict(type='full', groups=8)))
