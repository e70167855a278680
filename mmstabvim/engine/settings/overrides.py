"""Settings from the command line, each of which must have an effect."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from mmstabvim.engine.mistakes import SettingError
from mmstabvim.engine.settings.near_names import suggest
from mmstabvim.engine.settings.readers import get_path, readable_names
from mmstabvim.engine.settings.signatures import parameters_of


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
    """Tell if ``_delete_`` among the options empties a part first."""
    return any(
        other.endswith('._delete_')
        and option.startswith(other.removesuffix('_delete_'))
        for other in options
    )


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
    """Tell if a class that takes a number here takes text, too."""
    path, _, name = option.rpartition('.')
    node = get_path(cfg, path)
    if not isinstance(node, Mapping):
        return False
    parameter = (parameters_of(cfg, path, node) or {}).get(name)
    if parameter is None:
        return False
    hint = str(parameter.annotation).lower()
    return 'str' in hint or 'any' in hint or 'literal' in hint


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
            names = readable_names(old, cfg, path, node)
            if names is not None and key not in names:
                raise SettingError(_describe(old, option, path, key))
            node = node[key]
        else:
            node = node[int(key)]


def _describe(cfg: Config, option: str, path: str, key: str) -> str:
    """Explain why an option has no effect, with near names."""
    if path:
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
