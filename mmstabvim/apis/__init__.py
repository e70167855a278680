"""From a config and a checkpoint to a model, its images, a training."""

from mmstabvim.apis.model import get_model

__all__ = ['get_model']
