"""Refuse values that mmengine would trip over, naming the setting."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from mmstabvim.engine.mistakes import SettingError

_WHOLE = 'a whole number'
_NUMBER = 'a number'

_LEAST = {
    'train_cfg.max_epochs': (_WHOLE, 1),
    'train_cfg.max_iters': (_WHOLE, 1),
    'train_cfg.val_interval': (_WHOLE, 1),
    'train_cfg.val_begin': (_WHOLE, 0),
    'train_dataloader.batch_size': (_WHOLE, 1),
    'val_dataloader.batch_size': (_WHOLE, 1),
    'test_dataloader.batch_size': (_WHOLE, 1),
    'train_dataloader.num_workers': (_WHOLE, 0),
    'val_dataloader.num_workers': (_WHOLE, 0),
    'test_dataloader.num_workers': (_WHOLE, 0),
    'optim_wrapper.accumulative_counts': (_WHOLE, 1),
    'optim_wrapper.optimizer.lr': (_NUMBER, 0),
    'optim_wrapper.optimizer.weight_decay': (_NUMBER, 0),
    'auto_scale_lr.base_batch_size': (_WHOLE, 1),
    'randomness.seed': (_WHOLE, 0),
    'default_hooks.logger.interval': (_WHOLE, 1),
    'default_hooks.visualization.interval': (_WHOLE, 1),
}
"""Kind and least value of the settings that every training has."""


def check_values(cfg: Config) -> None:
    """Refuse a value of a wrong type or size.

    Args:
        cfg (Config): The whole config.

    Raises:
        ValueError: With the setting, what it wants and what it has.
    """
    for path, (kind, least) in _LEAST.items():
        for value in _values(cfg, path):
            if value is not None and not _fits(value, kind, least):
                raise SettingError(
                    f'{path} must be {kind}, at least {least}, got {value!r}'
                )
    for value in _values(cfg, 'default_hooks.checkpoint.interval'):
        if value != -1 and not _fits(value, _WHOLE, 1):
            raise SettingError(
                f'default_hooks.checkpoint.interval must be {_WHOLE}, at '
                f'least 1, or -1 for no checkpoints, got {value!r}'
            )


def _values(cfg: Config, path: str) -> Iterator[Any]:
    """Yield the value at a path, nothing where the path ends before."""
    node: Any = cfg
    for key in path.split('.'):
        if not isinstance(node, (Config, Mapping)) or key not in node:
            return
        node = node[key]
    yield node


def _fits(value: Any, kind: str, least: int) -> bool:
    """Tell if a value is of a kind and large enough."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    whole = kind == _NUMBER or value % 1 == 0
    return whole and value >= least
