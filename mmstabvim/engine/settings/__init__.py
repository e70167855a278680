"""Config files, settings from the command line, and their checks."""

from mmstabvim.engine.settings.config_file import read_config
from mmstabvim.engine.settings.file_settings import check_file_settings
from mmstabvim.engine.settings.overrides import merge_options
from mmstabvim.engine.settings.values import check_values

__all__ = [
    'check_file_settings',
    'check_values',
    'merge_options',
    'read_config',
]
