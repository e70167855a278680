"""One way from a config to a model."""

from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn


def build_model(cfg: Config, **defaults: Any) -> nn.Module:
    """Build the model of a config as a runner does.

    Args:
        cfg (Config): With ``model``, in the scope ``default_scope``; a
            ``data_preprocessor`` beside the model becomes the model's.
        **defaults: Arguments of the model that the config does not give.

    Returns:
        nn.Module: The model, on the CPU, weights as ``init_cfg`` leaves them
        before ``init_weights``.

    Example:
        >>> cfg = Config(dict(model=dict(type='mmstabvim.VisionMamba')))
        >>> build_model(cfg).num_layers
        24
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(cfg.model, default_args=defaults)
