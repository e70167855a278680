_base_ = '../../vim/vim-nano-p4_1xb64-20e_digits.py'

model = dict(backbone=dict(state_matrix=dict(type='full', groups=4)))
