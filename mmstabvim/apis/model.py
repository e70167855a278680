"""One door from a config and a checkpoint to a model."""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS
from mmengine.runner import load_checkpoint

from mmstabvim.building import build_model
from mmstabvim.engine import launch
from mmstabvim.engine.settings_check import merge_options
from mmstabvim.engine.work_dir import find_checkpoint


def get_model(
    config: str | os.PathLike | Config,
    checkpoint: str | os.PathLike | None = None,
    cfg_options: Mapping[str, Any] | None = None,
    device: str | torch.device = 'cpu',
) -> Any:
    """Build the model of a config, with the weights of a checkpoint.

    The functions and inferencers of both toolkits take the model: it has the
    attributes that they set, ``cfg`` and ``dataset_meta`` (MMSegmentation),
    ``_config`` and ``_dataset_meta`` (MMPretrain).

    Args:
        config (str | os.PathLike | Config): Path of the config, or the
            config, which is not changed.
        checkpoint (str | os.PathLike, optional): Path or URL, or the work
            dir of a training for its newest one. Defaults to None: weights
            as the model's classes initialize them.
        cfg_options (Mapping, optional): Dotted path to value. Defaults to
            None.
        device (str | torch.device): Defaults to ``'cpu'``, where
            synchronized batch norms become plain ones.

    Returns:
        nn.Module: The model in evaluation mode.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        ValueError: If a setting has no effect or a wrong value, or a weight
            of the checkpoint or of the model does not find the other.

    Example:
        >>> from mmstabvim.apis import get_model
        >>> model = get_model('configs/vim/vim-nano-p4_1xb64-20e_digits.py')
        >>> model.backbone.num_layers
        3
    """
    options = dict(cfg_options or {})
    if isinstance(config, Config):
        cfg = copy.deepcopy(config)
        merge_options(cfg, options)
    else:
        cfg = launch.read_settings(str(config), options)
    if not cfg.get('model'):
        raise ValueError(f'the config must have a model, got {sorted(cfg)}')
    model: Any = build_model(cfg)
    if torch.device(device).type == 'cpu':
        model = revert_sync_batchnorm(model)
    meta: dict[str, Any] = {}
    if checkpoint is not None:
        path = find_checkpoint(os.fspath(checkpoint))
        loaded = load_strictly(load_checkpoint, model, path, 'cpu')
        meta = loaded.get('meta') or {}
    model.cfg = model._config = cfg
    meta = meta.get('dataset_meta') or _dataset_meta(cfg)
    model.dataset_meta = model._dataset_meta = meta
    return model.to(device).eval()


def load_strictly(load: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Load a checkpoint that must fit the model exactly.

    mmengine only warns about a misfit, and would test random weights.

    Args:
        load (Callable): Takes ``strict``, and returns the checkpoint.
        *args: Its arguments.
        **kwargs: Its arguments by name.

    Returns:
        dict[str, Any]: The checkpoint.

    Raises:
        ValueError: If a weight of checkpoint or model does not find the
            other.
    """
    try:
        return load(*args, strict=True, **kwargs)
    except RuntimeError as error:
        raise ValueError(
            f'the checkpoint does not fit the model of the config: {error}'
        ) from error


def _dataset_meta(cfg: Config) -> dict[str, Any]:
    """Look up what the test set's class says of its classes."""
    loader = cfg.get('test_dataloader') or {}
    dataset: Any = loader.get('dataset') or {}
    while 'dataset' in dataset:  # a wrapper has none of its own
        dataset = dataset.dataset
    kind = dataset.get('type')
    found = DATASETS.get(kind) if isinstance(kind, str) else kind
    meta = dict(getattr(found, 'METAINFO', None) or {})
    given = dataset.get('metainfo')
    return meta | (dict(given) if isinstance(given, dict) else {})
