_base_ = '../../vim/vim-tiny-p16_8xb128_in1k.py'

model = dict(backbone=dict(state_matrix=dict(type='full', groups=8)))
