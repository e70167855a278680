"""Settings that somebody reads: the runner, mmengine, a class or a tool."""

import inspect
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner

from mmstabvim.engine.settings.signatures import accepted_names, parameters_of

_OTHER_NAMES = {
    'activation_checkpointing',
    'auto_scale_lr',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
}
"""Settings that are no arguments of a runner's constructor."""

_DEFAULT_HOOKS = {
    'runtime_info',
    'timer',
    'sampler_seed',
    'logger',
    'param_scheduler',
    'checkpoint',
}

_PARAMWISE = {
    'bias_decay_mult',
    'bias_lr_mult',
    'bypass_duplicate',
    'custom_keys',
    'dcn_offset_lr_mult',
    'dwconv_decay_mult',
    'flat_decay_mult',
    'norm_decay_mult',
}

_NAMES_READ = {
    'auto_scale_lr': {'base_batch_size', 'enable'},
    'env_cfg': {'cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'},
    'env_cfg.mp_cfg': {'mp_start_method', 'opencv_num_threads'},
    'custom_imports': {'allow_failed_imports', 'imports'},
    'randomness': {'deterministic', 'diff_rank_seed', 'seed'},
}
"""Names that mmengine reads in dicts without a class."""


def get_path(cfg: Config, path: str) -> Any:
    """Follow a dotted path; None where it does not lead anywhere."""
    node: Any = cfg
    for key in path.split('.') if path else ():
        if isinstance(node, (list, tuple)) and key.isdigit():
            node = node[int(key)] if int(key) < len(node) else None
        elif isinstance(node, Mapping) or node is cfg:
            node = node.get(key)
        else:
            return None
    return node


def names_read(cfg: Config) -> set[str]:
    """Collect the top-level settings that have an effect.

    Args:
        cfg (Config): The whole config: a model with its own
            ``data_preprocessor`` makes mmengine ignore the other one.

    Returns:
        set[str]: Names that the runner, mmengine or the tools read.
    """
    names = set(_OTHER_NAMES)
    for runner in (Runner, FlexibleRunner):
        names.update(inspect.signature(runner.__init__).parameters)
    names -= {'self', 'cfg'}
    if isinstance(get_path(cfg, 'model.data_preprocessor'), Mapping):
        names.discard('data_preprocessor')
    return names


def readable_names(
    old: Config, cfg: Config, path: str, node: Any
) -> set[str] | None:
    """Collect the settings of a part that have an effect.

    Args:
        old (Config): The config before it was changed.
        cfg (Config): The changed config.
        path (str): Dotted path of the part, empty for the whole.
        node (Any): The part.

    Returns:
        set[str] | None: Names; None where it cannot be told.
    """
    if path in _NAMES_READ:
        return _NAMES_READ[path] | {'_delete_'}
    if path == '':
        return names_read(cfg)
    if path == 'default_hooks':
        typed = {name for name, hook in node.items() if _has_type(hook)}
        return typed | _DEFAULT_HOOKS | set(get_path(old, path) or ())
    if path == 'optim_wrapper.paramwise_cfg':
        return _paramwise_names(cfg)
    parameters = parameters_of(cfg, path, node)
    if parameters is None:
        return None
    names = accepted_names(path, parameters)
    shared = isinstance(old.get('data_preprocessor'), Mapping)
    own = 'data_preprocessor' in (old.get(path) or {})
    if path == 'model' and shared and not own:
        names.discard('data_preprocessor')
    return names | {key for key in get_path(old, path) or () if key in node}


def _paramwise_names(cfg: Config) -> set[str] | None:
    """Collect the names that the optimizer wrapper's constructor reads."""
    constructor = cfg.optim_wrapper.get('constructor') or ''
    if constructor in ('', 'DefaultOptimWrapperConstructor'):
        return _PARAMWISE | {'_delete_'}
    if constructor == 'mmstabvim.LayerDecayOptimWrapperConstructor':
        return _PARAMWISE | {'_delete_', 'layer_decay_rate'}
    return None


def _has_type(hook: Any) -> bool:
    """Tell a hook that can be built; None takes a default one out."""
    return hook is None or (isinstance(hook, Mapping) and 'type' in hook)
