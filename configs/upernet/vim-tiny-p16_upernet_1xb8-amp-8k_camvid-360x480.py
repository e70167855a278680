# In bfloat16 autocast: the range of float32, so no loss scaling.
_base_ = './vim-tiny-p16_upernet_1xb8-8k_camvid-360x480.py'

optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
