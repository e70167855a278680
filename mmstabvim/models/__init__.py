"""Registered models and losses."""

from mmstabvim.models.backbones import VisionMamba
from mmstabvim.models.losses import (
    EntropyLoss,
    JacobianLoss,
    SpectralConstraintLoss,
    StabilityLoss,
)
from mmstabvim.models.necks import SimpleFeaturePyramid

__all__ = [
    'EntropyLoss',
    'JacobianLoss',
    'SimpleFeaturePyramid',
    'SpectralConstraintLoss',
    'StabilityLoss',
    'VisionMamba',
]
