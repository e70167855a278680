"""Registered models and losses."""

from mmstabvim.models.backbones import VisionMamba
from mmstabvim.models.losses import StabilityLoss

__all__ = ['StabilityLoss', 'VisionMamba']
