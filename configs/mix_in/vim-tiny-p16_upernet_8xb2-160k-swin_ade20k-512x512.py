# MMSegmentation's UPerNet recipe of Swin-T on ADE20K, with Vision Mamba in
# its place: a neck makes four scales of its one, the heads keep their sizes.
_base_ = (
    'mmseg::swin/'
    'swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
)

custom_imports = dict(imports=['mmstabvim'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmstabvim.VisionMamba',
        arch='tiny',
        img_size=512,
        patch_size=16,
        cls_token=None,
        out_type='featmap',
        out_indices=(5, 11, 17, 23),
    ),
    neck=dict(
        type='mmstabvim.SimpleFeaturePyramid',
        in_channels=192,
        stride=16,
        out_strides=(4, 8, 16, 32),
        norm_cfg=dict(type='SyncBN'),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)

# beside the recipe's own keys; without decay for the state matrix and for
# what is one-dimensional
optim_wrapper = dict(
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={
            '.state_matrix': dict(decay_mult=0.0),
            '.pos_embed': dict(decay_mult=0.0),
        },
    ),
)

default_hooks = dict(
    # no faster than the radius that each matrix starts with
    sn=dict(type='mmstabvim.SpectralNormalizationHook', rho_max='init'),
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
    stability=dict(type='mmstabvim.StabilityMonitorHook', interval=100),
    divergence=dict(type='mmstabvim.DivergenceHook'),
)
