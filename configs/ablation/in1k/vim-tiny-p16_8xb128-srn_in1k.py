_base_ = [
    '../../vim/vim-tiny-p16_8xb128_in1k.py',
    '../../_base_/stabilizers/srn.py',
]
