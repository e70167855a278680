# One small layer, two iterations: a training in the time of its imports.
_base_ = ['../../../configs/vim/vim-nano-p4_1xb64-20e_digits.py']

model = dict(
    backbone=dict(
        arch=dict(embed_dims=8, num_layers=1, d_state=2), patch_size=16
    ),
    head=dict(in_channels=8),
)
train_dataloader = dict(batch_size=8, dataset=dict(indices=16))
val_dataloader = dict(dataset=dict(indices=16))
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1))
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(vis_backends=vis_backends)
train_cfg = dict(max_epochs=1)
param_scheduler = []
