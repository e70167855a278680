"""Registered backbones."""

from mmstabvim.models.backbones.vision_mamba import VisionMamba

__all__ = ['VisionMamba']
