_base_ = [
    '../../upernet/vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py',
    '../../_base_/stabilizers/ec_sp.py',
]
