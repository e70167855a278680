# MMPretrain's ResNet-18 on CIFAR-10, without any Mamba, with the hooks that
# serve every model: a divergence is found, reported and rolled back, the
# gradient of each layer is recorded, and a resumed run repeats the
# uninterrupted one.
_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'

custom_imports = dict(imports=['mmstabvim'], allow_failed_imports=False)

default_hooks = dict(
    divergence=dict(type='mmstabvim.DivergenceHook', action='rollback'),
    stability=dict(type='mmstabvim.StabilityMonitorHook', interval=100),
    random_state=dict(type='mmstabvim.RandomStateHook'),
)
