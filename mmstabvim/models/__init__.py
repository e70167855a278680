"""Registered models."""

from mmstabvim.models.backbones import VisionMamba

__all__ = ['VisionMamba']
