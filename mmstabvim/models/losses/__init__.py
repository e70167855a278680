"""Losses on the parameters of a model, and on its answers to changes."""

from mmstabvim.models.losses.entropy_loss import EntropyLoss
from mmstabvim.models.losses.jacobian_loss import JacobianLoss
from mmstabvim.models.losses.spectral_constraint_loss import (
    SpectralConstraintLoss,
)
from mmstabvim.models.losses.stability_loss import StabilityLoss

__all__ = [
    'EntropyLoss',
    'JacobianLoss',
    'SpectralConstraintLoss',
    'StabilityLoss',
]
