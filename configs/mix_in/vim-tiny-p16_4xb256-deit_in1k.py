# MMPretrain's ImageNet recipe of DeiT-tiny, with Vision Mamba in its place.
_base_ = 'mmpretrain::deit/deit-tiny_4xb256_in1k.py'

custom_imports = dict(imports=['mmstabvim'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmstabvim.VisionMamba',
        arch='tiny',
        img_size=224,
        patch_size=16,
    ),
    # The recipe's rule draws every linear layer of the model anew: output
    # projections would not be scaled down with the depth.
    init_cfg=None,
)

# weight decay would pull on the eigenvalues
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={'.state_matrix': dict(decay_mult=0.0)},
    ),
)

default_hooks = dict(
    ec=dict(type='mmstabvim.EigenvalueClampingHook', eps=0.01),
    stability=dict(type='mmstabvim.StabilityMonitorHook', interval=100),
    divergence=dict(type='mmstabvim.DivergenceHook'),
)
