# importing the package sets its compatibility shims and names its registries
custom_imports = dict(imports=['mmstabvim'], allow_failed_imports=False)
default_scope = 'mmpretrain'

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
    random_state=dict(type='mmstabvim.RandomStateHook'),
    data_check=dict(type='mmstabvim.ClassificationDataCheckHook'),
    stability=dict(type='mmstabvim.StabilityMonitorHook', interval=100),
    divergence=dict(type='mmstabvim.DivergenceHook'),
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)

# scalars go to a JSON file and, for `tensorboard --logdir`, to event files
vis_backends = [
    dict(type='LocalVisBackend'),
    dict(type='TensorboardVisBackend'),
]
visualizer = dict(type='UniversalVisualizer', vis_backends=vis_backends)

log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
