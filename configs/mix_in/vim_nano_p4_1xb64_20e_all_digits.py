"""The digits demo with all stabilizers, as a config in MMEngine's new style.

Bases are Python imports, relative ones as nothing else is found in every kind
of installation, and types are the classes themselves.
"""

# ruff: noqa: F403, F405
from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from torch.optim import AdamW

from mmstabvim import (
    EigenvalueClampingHook,
    SpectralNormalizationHook,
    StabilityLossHook,
)

with read_base():
    from .._base_.datasets.digits_bs64 import *
    from .._base_.default_runtime import *
    from .._base_.models.vim_nano_p4 import model
    from .._base_.schedules.no_decay import optim_wrapper

# full matrices, on which every stabilizer can act
model.merge(dict(backbone=dict(state_matrix=dict(type='full', groups=4))))

default_hooks.merge(
    dict(
        sn=dict(type=SpectralNormalizationHook, rho_max=1.0),
        ec=dict(type=EigenvalueClampingHook, eps=0.01),
        sp=dict(type=StabilityLossHook, eps=0.01, reduction='mean'),
    )
)

optim_wrapper.merge(
    dict(
        type=OptimWrapper,
        optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05),
        clip_grad=dict(max_norm=1.0),
    )
)

param_scheduler = [
    dict(
        type=LinearLR,
        start_factor=1e-2,
        by_epoch=True,
        end=2,
        convert_to_iter_based=True,
    ),
    dict(
        type=CosineAnnealingLR,
        eta_min=2e-5,
        by_epoch=True,
        begin=2,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = {}
test_cfg = {}
