"""Refuse settings without effect, and name the ones that were meant."""

import copy
import difflib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import FlexibleRunner, Runner
from mmengine.utils import import_modules_from_strings

from mmstabvim.compat import DEFAULT_HOOKS
from mmstabvim.engine.config_file import ConfigFile
from mmstabvim.engine.mistakes import SettingError
from mmstabvim.engine.signatures import accepted_names, parameters_of

# Read from the config, but no argument of a runner's constructor.
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

# Dicts without a class, of which mmengine reads these names only.
_NAMES_READ = {
    'auto_scale_lr': {'base_batch_size', 'enable'},
    'env_cfg': {'cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'},
    'env_cfg.mp_cfg': {'mp_start_method', 'opencv_num_threads'},
    'custom_imports': {'allow_failed_imports', 'imports'},
    'randomness': {'deterministic', 'diff_rank_seed', 'seed'},
}

# Names of MMCV 1.x and of other tools.
_OLD_NAMES = {
    'batch': 'batch_size',
    'epochs': 'max_epochs',
    'iters': 'max_iters',
    'learning_rate': 'lr',
    'resume_from': 'load_from',
    'samples_per_gpu': 'batch_size',
    'total_epochs': 'max_epochs',
    'workers': 'num_workers',
    'workers_per_gpu': 'num_workers',
}

_MAX_NEAR = 6


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Apply ``--cfg-options``, each of which must have an effect.

    Args:
        cfg (Config): Changed in place.
        options (Mapping[str, Any]): Dotted path to value.

    Raises:
        ValueError: If nothing reads a setting, or a path or a value does not
            fit; with the settings that were probably meant.
    """
    old = copy.copy(cfg)
    for option, value in options.items():
        _check_path(old, option, value, _is_replaced(option, options))
    try:
        cfg.merge_from_dict(copy.deepcopy(dict(options)))
    except (AttributeError, KeyError, TypeError) as error:
        raise SettingError(
            f'--cfg-options {" ".join(options)} do not fit together: {error}'
        ) from error
    for option in options:
        _check_read(old, cfg, option)
    if any(o.partition('.')[0] == 'custom_imports' for o in options):
        import_modules_from_strings(**cfg.custom_imports)


def _is_replaced(option: str, options: Mapping[str, Any]) -> bool:
    """Tell whether ``_delete_`` among the options empties a part first."""
    return any(
        other.endswith('._delete_')
        and option.startswith(other.removesuffix('_delete_'))
        for other in options
    )


# --- where an option goes ---------------------------------------------------


def _check_path(cfg: Config, option: str, value: Any, replaced: bool) -> None:
    """Refuse a path through something that has no parts."""
    keys = option.split('.')
    if not all(keys):
        raise SettingError(
            f'--cfg-options {option}: wanted names between the dots'
        )
    node: Any = cfg
    for i, key in enumerate(keys):
        path = '.'.join(keys[:i])
        if isinstance(node, Sequence) and not isinstance(node, str):
            node = node[_index(node, key, path, option)]
        elif isinstance(node, (Mapping, Config)):
            if key not in node:
                return
            node = node[key]
        elif not replaced:
            cure = (
                f'; set it whole: {path}._delete_=True beside this option'
                if node is None
                else ''
            )
            raise SettingError(
                f'--cfg-options {option}: {path} is {node!r}, which has no '
                f'{key!r}{cure}'
            )
        else:
            return
    _check_kind(cfg, option, node, value)


def _index(node: Sequence, key: str, path: str, option: str) -> int:
    """Read an index of a list."""
    if isinstance(node, tuple):
        raise SettingError(
            f'--cfg-options {option}: {path} is a tuple, whose entries '
            f'cannot be set one by one: set {path}=(...)'
        )
    if not key.isdigit() or int(key) >= len(node):
        wanted = f'0 to {len(node) - 1}' if node else 'none: it is empty'
        raise SettingError(
            f'--cfg-options {option}: {path} is a list, wanted an index '
            f'({wanted}), got {key!r}'
        )
    return int(key)


def _check_kind(cfg: Config, option: str, old: Any, new: Any) -> None:
    """Refuse a word in place of a number, and a value in place of a dict."""
    if isinstance(old, Mapping):
        if not isinstance(new, (Mapping, bool, type(None))):
            raise SettingError(
                f'--cfg-options {option} wants settings by name, such as '
                f'{option}.{next(iter(old), "type")}=..., got {new!r}'
            )
    elif isinstance(old, (bool, int, float)) and isinstance(new, str):
        if _may_be_text(cfg, option):
            return
        wanted = 'True or False' if isinstance(old, bool) else 'a number'
        raise SettingError(
            f'--cfg-options {option} wants {wanted} (it is {old!r}), '
            f'got {new!r}'
        )


def _may_be_text(cfg: Config, option: str) -> bool:
    """Tell whether a class that takes a number here takes text, too."""
    path, _, name = option.rpartition('.')
    node = _get(cfg, path)
    known = parameters_of(cfg, path, node) if _is_dict(node) else None
    parameter = (known or {}).get(name)
    if parameter is None:
        return False
    hint = str(parameter.annotation).lower()
    return 'str' in hint or 'any' in hint or 'literal' in hint


# --- who reads it -----------------------------------------------------------


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
    if _is_dict(_get(cfg, 'model.data_preprocessor')):
        names.discard('data_preprocessor')
    return names


def _check_read(old: Config, cfg: Config, option: str) -> None:
    """Refuse an option that nothing reads."""
    keys = option.split('.')
    if keys[0] == 'launcher':
        raise SettingError(
            f'--cfg-options {option} has no effect: --launcher sets it'
        )
    node: Any = cfg
    for i, key in enumerate(keys):
        if key == '_delete_':
            return
        path = '.'.join(keys[:i])
        if isinstance(node, Mapping) or node is cfg:
            names = _readable(old, cfg, path, node)
            if names is not None and key not in names:
                raise SettingError(_describe(old, option, path, key))
            node = node[key]
        else:
            node = node[int(key)]


def _readable(
    old: Config, cfg: Config, path: str, node: Any
) -> set[str] | None:
    """Names of a part that somebody reads, None where it cannot be told."""
    if path in _NAMES_READ:
        return _NAMES_READ[path] | {'_delete_'}
    if path == '':
        return names_read(cfg)
    if path == 'default_hooks':
        typed = {name for name, hook in node.items() if _has_type(hook)}
        return typed | DEFAULT_HOOKS | set(_get(old, path) or ())
    if path == 'optim_wrapper.paramwise_cfg':
        return _paramwise_names(cfg)
    parameters = parameters_of(cfg, path, node)
    if parameters is None:
        return None
    names = accepted_names(path, parameters)
    own = 'data_preprocessor' in (old.get(path) or {})
    if path == 'model' and not own and _is_dict(old.get('data_preprocessor')):
        names.discard('data_preprocessor')
    return names | {key for key in _get(old, path) or () if key in node}


def _paramwise_names(cfg: Config) -> set[str] | None:
    """Names that the optimizer wrapper's constructor reads."""
    constructor = cfg.optim_wrapper.get('constructor') or ''
    if constructor in ('', 'DefaultOptimWrapperConstructor'):
        return _PARAMWISE | {'_delete_'}
    if constructor == 'mmstabvim.LayerDecayOptimWrapperConstructor':
        return _PARAMWISE | {'_delete_', 'layer_decay_rate'}
    return None


def _has_type(hook: Any) -> bool:
    """Tell a hook that can be built; None takes a default one out."""
    return hook is None or (_is_dict(hook) and 'type' in hook)


def _describe(cfg: Config, option: str, path: str, key: str) -> str:
    """Say why an option has no effect, and what was meant."""
    if path == 'default_hooks':
        reason = f'{path}.{key} has no type, so nothing builds it'
    elif path:
        reason = f'{path} has no {key!r}, so nothing reads it'
    elif key in cfg and key != 'data_preprocessor':
        reason = (
            f'the variable {key!r} of the config was used while the file '
            'was read, so nothing reads it now'
        )
    elif key in cfg:
        reason = f'nothing reads {key!r}, as the model has its own'
    else:
        reason = f'the config has no {key!r}, so nothing reads it'
    old_value = cfg.get(key) if not path else None
    return f'--cfg-options {option}: {reason}{suggest(cfg, option, old_value)}'


# --- what was meant ---------------------------------------------------------


def suggest(cfg: Config, name: str, old_value: Any = None) -> str:
    """Find the settings that a name without effect was meant for.

    Args:
        cfg (Config): The whole config.
        name (str): Dotted path or variable.
        old_value (Any): Value of the variable in the config: it went where
            the same value is now. Defaults to None.

    Returns:
        str: ``'; near names: ...'``, empty without any.
    """
    read = names_read(cfg)
    paths = [
        path
        for path in dict.fromkeys(_paths(cfg, '', cfg))
        if path.partition('.')[0] in read and not path.endswith('._scope_')
    ]
    last = name.rpartition('.')[2]
    near = _ending_in(paths, _OLD_NAMES.get(last, last), name)
    if not near and isinstance(old_value, (str, list, tuple, dict)):
        near = [path for path in paths if _get(cfg, path) == old_value]
    if not near:
        near = difflib.get_close_matches(name, paths, _MAX_NEAR)
    if not near:
        ends = sorted({path.rpartition('.')[2] for path in paths})
        for end in difflib.get_close_matches(last, ends, 1, 0.75):
            near = _ending_in(paths, end, name)
    return f'; near names: {", ".join(near[:_MAX_NEAR])}' if near else ''


def _ending_in(paths: list[str], last: str, name: str) -> list[str]:
    """Paths whose last part is this one, the most similar ones first."""
    found = [path for path in paths if path.rpartition('.')[2] == last]
    match = difflib.SequenceMatcher(b=name)

    def distance(path: str) -> tuple[bool, bool, float]:
        match.set_seq1(path)
        suffix = path == name or path.endswith(f'.{name}')
        return not suffix, any(map(str.isdigit, path)), -match.ratio()

    return sorted(found, key=distance)


def _paths(cfg: Config, path: str, node: Any) -> Iterator[str]:
    """Walk all settings, those that could be added to a class behind."""
    if isinstance(node, Mapping) or node is cfg:
        for key in node:
            below = f'{path}.{key}' if path else str(key)
            yield below
            yield from _paths(cfg, below, node[key])
        if path and isinstance(node, Mapping):
            yield from (
                f'{path}.{n}' for n in parameters_of(cfg, path, node) or ()
            )
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from _paths(cfg, f'{path}.{i}', child)


def _get(cfg: Config, path: str) -> Any:
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


def _is_dict(node: Any) -> bool:
    return isinstance(node, Mapping)


# --- what a config file sets ------------------------------------------------


def check_file_settings(cfg: Config, file: ConfigFile) -> None:
    """Refuse a setting in a config file that nothing reads.

    A variable of a base has been used when the child sets it again. Files of
    other packages may set what they like.

    Args:
        cfg (Config): The whole config.
        file (ConfigFile): The file that it was read from.

    Raises:
        ValueError: If a file sets a variable of its base again without using
            it, or a name that is nearly a setting's.
    """
    read = names_read(cfg)
    used_above: set[str] = set()
    pending = [(file, used_above)]
    while pending:
        part, above = pending.pop()
        if part.foreign:
            continue
        used = above | part.used
        for name in sorted(part.names - read - used):
            if not name.startswith('_'):
                _refuse_or_warn(cfg, part, name, read)
        pending += [(base, used) for base in part.bases]


def _refuse_or_warn(
    cfg: Config, file: ConfigFile, name: str, read: set[str]
) -> None:
    """Decide about a name that nothing reads."""
    if name in file.inherited():
        raise SettingError(
            f'{file.path}: {name!r} has no effect: it is a variable of the '
            f'base, which was used while the base was read'
            f'{suggest(cfg, name, _value_in_bases(file, name))}'
        )
    if name == 'data_preprocessor':
        return
    near = difflib.get_close_matches(name, sorted(read), 1, 0.9)
    if near:
        raise SettingError(
            f'{file.path}: nothing reads {name!r}; near names: {near[0]}'
        )
    print_log(
        f'{file.path}: nothing reads {name!r}{suggest(cfg, name)}',
        'current',
        logging.WARNING,
    )


def _value_in_bases(file: ConfigFile, name: str) -> Any:
    """Value that the bases give to a variable."""
    for base in file.bases:
        if any(name in part.names for part in base.walk()):
            return Config.fromfile(base.path).get(name)
    return None
