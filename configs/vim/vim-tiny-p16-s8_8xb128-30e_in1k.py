# Fine-tuning with overlapping patches (stride 8, 27 x 27 of them), published
# as Vim-tiny+. Set `load_from` to a checkpoint of `vim-tiny-p16_8xb128_in1k`:
# the position embedding is resized when it is loaded.
_base_ = './vim-tiny-p16_8xb128_in1k.py'

model = dict(backbone=dict(patch_stride=8, drop_path_rate=0.0))

optim_wrapper = dict(
    optimizer=dict(lr=5e-6 * 1024 / 512, weight_decay=1e-8),
)
# start, end and peak of the published schedule are all 1e-5: constant
param_scheduler = []
train_cfg = dict(max_epochs=30)

load_from = None
