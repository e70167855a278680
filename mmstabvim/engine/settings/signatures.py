"""Names that the class behind a part of a config accepts."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import mmengine.registry as registries
from mmengine.config import Config
from torch.utils.data import DataLoader

Parameters = dict[str, inspect.Parameter]

_REGISTRIES = {
    'model': ('MODELS',),
    'tta_model': ('MODELS',),
    'data_preprocessor': ('MODELS',),
    'model_wrapper_cfg': ('MODEL_WRAPPERS',),
    'dataloader': ('DATASETS', 'TRANSFORMS', 'DATA_SAMPLERS'),
    'pipeline': ('TRANSFORMS',),
    'evaluator': ('METRICS', 'EVALUATOR'),
    'cfg': ('LOOPS',),
    'optim_wrapper': ('OPTIM_WRAPPERS', 'OPTIMIZERS'),
    'param_scheduler': ('PARAM_SCHEDULERS',),
    'hooks': ('HOOKS',),
    'visualizer': ('VISUALIZERS', 'VISBACKENDS'),
    'log_processor': ('LOG_PROCESSORS',),
}
"""Registries of a setting's types, by the end of its name."""

_DEFAULT_TYPES: dict[str, Any] = {
    'train_dataloader': DataLoader,
    'val_dataloader': DataLoader,
    'test_dataloader': DataLoader,
    'data_preprocessor': 'ClsDataPreProcessor',
    'train_cfg': 'EpochBasedTrainLoop',
    'val_cfg': 'ValLoop',
    'test_cfg': 'TestLoop',
    'optim_wrapper': 'OptimWrapper',
    'log_processor': 'LogProcessor',
    'visualizer': 'Visualizer',
    'model_wrapper_cfg': 'MMDistributedDataParallel',
}
"""Classes that are built where a setting has no ``type``."""

_READ_BEFORE = {
    'dataloader': {'num_batch_per_epoch'},
    'hooks': {'priority'},
    'cfg': {'by_epoch'},
    'optim_wrapper': {'constructor', 'paramwise_cfg'},
    'param_scheduler': {'convert_to_iter_based', 'by_epoch'},
    'model': {'requires_grad'},
}
"""Names that the builder takes out before."""


def parameters_of(
    cfg: Config, path: str, node: Mapping[str, Any]
) -> Parameters | None:
    """Find the arguments of the class that a part of a config asks for.

    Args:
        cfg (Config): The whole config; its ``default_scope`` counts.
        path (str): Dotted path of the part.
        node (Mapping): The part.

    Returns:
        dict[str, Parameter] | None: Arguments by name. None where the part
        has no class, or one that takes any name.
    """
    kind = node.get('type') or _default_type(path, node)
    if isinstance(kind, str):
        kind = _look_up(cfg, path.partition('.')[0], kind)
    return None if kind is None else _parameters(kind)


def accepted_names(path: str, parameters: Parameters) -> set[str]:
    """Add to a class's arguments what its builder takes.

    Args:
        path (str): Dotted path of the part.
        parameters (dict[str, Parameter]): Parameters of its class.

    Returns:
        set[str]: All names.
    """
    names = {*parameters, 'type', '_scope_', '_delete_'}
    top = path.partition('.')[0]
    for end, more in _READ_BEFORE.items():
        if top.endswith(end):
            names |= more
    return names


def _default_type(path: str, node: Mapping[str, Any]) -> Any:
    """Return the class that mmengine takes without ``type``."""
    if path == 'train_cfg' and node.get('by_epoch') is False:
        return 'IterBasedTrainLoop'
    return _DEFAULT_TYPES.get(path)


def _look_up(cfg: Config, top: str, kind: str) -> Any:
    """Find a registered class or function; None where there is none."""
    scope = cfg.get('default_scope', 'mmengine')
    for end, names in _REGISTRIES.items():
        if not top.endswith(end):
            continue
        for name in names:
            root = getattr(registries, name)
            # an unknown name is an error where it is built, with near names
            with (
                suppress(Exception),
                root.switch_scope_and_registry(scope) as registry,
            ):
                found = registry.get(kind)
                if found is not None:
                    return found
    return None


def _parameters(kind: Any) -> Parameters | None:
    """Collect parameters; ``**kwargs`` go to the next base class."""
    if not inspect.isclass(kind):
        return _own_parameters(kind)
    found: Parameters = {}
    for cls in kind.__mro__:
        if '__init__' not in vars(cls):
            continue
        own = inspect.signature(vars(cls)['__init__']).parameters
        found = {**_named(own), **found}
        if not _takes_any(own):
            found.pop('self', None)
            return found
    return None


def _own_parameters(function: Any) -> Parameters | None:
    """Collect a function's parameters; None where it takes any name."""
    own = inspect.signature(function).parameters
    return None if _takes_any(own) else _named(own)


def _named(parameters: Mapping[str, inspect.Parameter]) -> Parameters:
    """Leave out ``*args`` and ``**kwargs``."""
    various = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {n: p for n, p in parameters.items() if p.kind not in various}


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Tell if there are ``**kwargs``."""
    kinds = {p.kind for p in parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds
