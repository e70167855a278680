# CamVid on one GPU. With 367 images to train on it wants pre-trained weights
# (docs/segmentation.md). Not measured.
_base_ = [
    '../_base_/models/upernet_vim_tiny_p16.py',
    '../_base_/datasets/camvid_360x480.py',
    '../_base_/schedules/camvid_bs8_adamw_8k.py',
    '../_base_/default_runtime_seg.py',
]

model = dict(
    data_preprocessor=dict(size=(360, 480)),
    backbone=dict(img_size=(360, 480)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
    test_cfg=dict(_delete_=True, mode='whole'),
)

train_dataloader = dict(batch_size=8)

default_hooks = dict(checkpoint=dict(interval=800, save_best='mIoU'))
