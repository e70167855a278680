# In bfloat16 autocast: the range of float32, so no loss scaling.
_base_ = './vim-tiny-p16_upernet_8xb4-60k_ade20k-512x512.py'

optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
