# A plain FCN head on the one scale of Vision Mamba: MMSegmentation's recipe
# of the same head on ViT-S, on ADE20K.
_base_ = 'mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py'

custom_imports = dict(imports=['mmstabvim'], allow_failed_imports=False)

model = dict(
    pretrained=None,  # the weights of a ViT
    backbone=dict(
        _delete_=True,
        type='mmstabvim.VisionMamba',
        arch='small',
        img_size=512,
        patch_size=16,
        cls_token=None,
        out_type='featmap',
    ),
)

default_hooks = dict(
    stability=dict(type='mmstabvim.StabilityMonitorHook', interval=100),
    divergence=dict(type='mmstabvim.DivergenceHook'),
)
