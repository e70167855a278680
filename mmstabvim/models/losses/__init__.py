"""Losses on the parameters of a model."""

from mmstabvim.models.losses.stability_loss import StabilityLoss

__all__ = ['StabilityLoss']
