"""Refuse settings of a config file that nothing reads."""

import difflib
import logging
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from mmstabvim.engine.mistakes import SettingError
from mmstabvim.engine.settings.config_file import ConfigFile
from mmstabvim.engine.settings.near_names import suggest
from mmstabvim.engine.settings.readers import names_read


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
