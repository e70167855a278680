"""Fit a schedule of the learning rate into a shorter training."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log

from mmstabvim.engine.mistakes import SettingError

_OF_ONE_UNIT = ('T_max', 'milestones', 'period', 'step_size', 'total_steps')
"""Arguments that count steps of the scheduler's own unit."""


def fit_schedule(schedulers: Any, max_iters: int, epoch_length: int) -> Any:
    """Shorten the warm-up where the training ends before it does.

    mmengine refuses a scheduler that begins after the last epoch and has no
    end of its own; one with an end would never act. Then what comes before
    the last scheduler, the warm-up, takes a tenth of the training, and the
    last one the rest.

    Args:
        schedulers (list[dict] | dict): ``param_scheduler`` of a config.
        max_iters (int): Iterations of the training.
        epoch_length (int): Iterations of an epoch.

    Returns:
        list[dict] | dict: The given schedulers if all of them act, else
        others, counted in iterations.

    Raises:
        ValueError: If a scheduler that must be moved counts steps in another
            way.
    """
    parts = [schedulers] if isinstance(schedulers, Mapping) else schedulers
    if not isinstance(parts, Sequence) or not all(map(_is_config, parts)):
        return schedulers  # of several optimizers, or built already
    begins = [_iterations(p, p.get('begin', 0), epoch_length) for p in parts]
    last = max(begins, default=0)
    if last < max_iters:
        return schedulers
    fitted = [_fit(part, last, max_iters, epoch_length) for part in parts]
    print_log(
        f'param_scheduler: the training has {max_iters} iterations and its '
        f'last scheduler begins at {last}: the warm-up is shortened to '
        f'{max_iters // 10}. Set `begin` and `end` of the schedulers for '
        'another schedule.',
        'current',
    )
    return [part for part in fitted if part is not None]


def _is_config(part: Any) -> bool:
    return isinstance(part, Mapping) and 'type' in part


def _iterations(part: Mapping[str, Any], steps: int, epoch_length: int) -> int:
    """Convert steps of a scheduler into iterations."""
    return steps * epoch_length if part.get('by_epoch', True) else steps


def _fit(
    part: Mapping[str, Any], last: int, max_iters: int, epoch_length: int
) -> dict[str, Any] | None:
    """Move a scheduler; None where nothing is left of it."""
    fixed = [name for name in _OF_ONE_UNIT if name in part]
    if fixed:
        raise SettingError(
            f'param_scheduler: the training has {max_iters} iterations and '
            f'its last scheduler begins at {last}; set `begin`, `end` and '
            f'{", ".join(fixed)} of {part["type"]}, or train longer '
            '(train_cfg.max_epochs or train_cfg.max_iters)'
        )
    new = dict(copy.deepcopy(part))
    new.pop('convert_to_iter_based', None)

    def move(steps: int | None) -> int:
        count = _iterations(
            part, last if steps is None else steps, epoch_length
        )
        return min(count, last) * (max_iters // 10) // last

    begin = move(part.get('begin', 0))
    end = part.get('end')
    ends_last = end is None or _iterations(part, end, epoch_length) > last
    new.update(
        by_epoch=False,
        begin=begin,
        end=max_iters if ends_last else move(end),
    )
    # a warm-up of one step would divide by zero
    return new if ends_last or new['end'] - begin > 1 else None


def fit_to_runner(runner: Any) -> None:
    """Make a runner fit its schedule when it builds it.

    Args:
        runner (Runner): Changed in place.
    """
    build: Callable[[Any], Any] = runner.build_param_scheduler

    def build_fitted(schedulers: Any) -> Any:
        length = len(runner.train_dataloader)
        return build(fit_schedule(schedulers, runner.max_iters, length))

    runner.build_param_scheduler = build_fitted
