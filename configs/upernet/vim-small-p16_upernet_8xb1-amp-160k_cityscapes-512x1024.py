# In bfloat16 autocast: the range of float32, so no loss scaling.
_base_ = './vim-small-p16_upernet_8xb1-160k_cityscapes-512x1024.py'

optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
