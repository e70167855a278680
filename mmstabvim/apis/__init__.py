"""From a config and a checkpoint to a model, its images, a training."""

from mmstabvim.apis.model import get_model
from mmstabvim.apis.testing import evaluate
from mmstabvim.apis.training import train

__all__ = ['evaluate', 'get_model', 'train']
