# Cityscapes: batch and learning rate that are usual for transformers there
# (arXiv:2105.15203); nothing was published for Vim. Not measured.
_base_ = [
    '../_base_/models/upernet_vim_tiny_p16.py',
    '../_base_/datasets/cityscapes_512x1024.py',
    '../_base_/schedules/seg_bs16_adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(img_size=(512, 1024)),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(crop_size=(512, 1024), stride=(341, 683)),
)

default_hooks = dict(checkpoint=dict(interval=16000, save_best='mIoU'))

# `--auto-scale-lr` scales the learning rate from this total batch size
auto_scale_lr = dict(base_batch_size=8)
