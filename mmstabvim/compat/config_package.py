"""Configs of this package as bases: ``'mmstabvim::...'``."""

import functools
from collections.abc import Callable
from pathlib import Path

from mmengine.config import config as config_module
from mmengine.config import utils as config_utils
from mmengine.hub import hub as hub_module

PACKAGE = Path(__file__).resolve().parents[1]


def add_config_package() -> None:
    """Let a config name ``'mmstabvim::...'`` as a base.

    mmengine 0.10.7 and 0.11.0rc3 know only their own packages, look for an
    editable install in the wrong folder, and search the bare type names of
    such a base in its package, where these configs name the toolkits' types.
    Ends when mmengine accepts any installed package, finds it by its import
    path, and leaves bare names to ``default_scope``.
    """
    config_utils.MODULE2PACKAGE.setdefault('mmstabvim', 'mmstabvim')
    find_base = config_module.Config._get_cfg_path
    if not hasattr(find_base, '__wrapped__'):
        config_module.Config._get_cfg_path = staticmethod(
            _without_own_scope(find_base)
        )
    for module in (config_module, hub_module):
        original = module.get_installed_path
        if not hasattr(original, '__wrapped__'):
            module.get_installed_path = _with_own_path(original)


def _with_own_path(get_installed_path: Callable) -> Callable:
    """Return this package's folder; ask mmengine for the others."""

    @functools.wraps(get_installed_path)
    def find(package: str) -> str:
        if package == 'mmstabvim':
            return str(PACKAGE)
        return get_installed_path(package)

    return find


def _without_own_scope(get_cfg_path: Callable) -> Callable:
    """Keep mmengine from marking this package's configs with its scope."""

    @functools.wraps(get_cfg_path)
    def find(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = get_cfg_path(cfg_path, filename)
        return path, None if scope == 'mmstabvim' else scope

    return find
