"""This package's models by name, in MMPretrain's and MMEngine's hubs."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import mmengine.hub

from mmstabvim.building import build_model

MIM = Path(__file__).parent / '.mim'
"""Configs and index, put there by the installation."""


def register_models(module: ModuleType) -> None:
    """Enter the published models into MMPretrain's hub.

    So ``mmpretrain.list_models('*vim*')`` and ``mmpretrain.get_model(name)``
    know them.

    Args:
        module (ModuleType): ``mmpretrain.apis.model``.
    """
    known = module.ModelHub._models_dict
    if (MIM / 'model-index.yml').is_file() and not any(
        Path(str(model.filepath)).is_relative_to(MIM)
        for model in known.values()
    ):
        module.ModelHub.register_model_index(MIM / 'model-index.yml', MIM)


def serve_hub() -> None:
    """Let ``mmengine.hub.get_model('mmstabvim::...')`` build a model.

    mmengine 0.10.7 builds in the scope of the package that has the config;
    these configs name the toolkits' types. Ends when mmengine heeds the
    config's ``default_scope``.
    """
    original = mmengine.hub.hub.get_model
    if not hasattr(original, '__wrapped__'):
        wrapped = _with_own_models(original)
        mmengine.hub.get_model = mmengine.hub.hub.get_model = wrapped


def _with_own_models(get_model: Callable) -> Callable:
    """Build this package's models here, leave the others to mmengine."""

    @wraps(get_model)
    def build(cfg_path: str, pretrained: bool = False, **kwargs: Any) -> Any:
        if not cfg_path.startswith('mmstabvim::'):
            return get_model(cfg_path, pretrained, **kwargs)
        if pretrained:
            raise ValueError(
                f'pretrained must be False for {cfg_path}: no weights are '
                'published with these configs; load a local file with '
                'mmstabvim.load_weights(model, file)'
            )
        cfg = mmengine.hub.get_config(cfg_path)
        return build_model(cfg, **kwargs)

    return build
