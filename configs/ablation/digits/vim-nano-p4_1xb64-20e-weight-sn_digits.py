_base_ = [
    '../../vim/vim-nano-p4_1xb64-20e_digits.py',
    '../../_base_/stabilizers/weight_sn.py',
]
