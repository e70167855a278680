"""The last checkpoint before a divergence, and the way back to it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner
from torch import Tensor

from mmstabvim.checkpoint import load_everything
from mmstabvim.engine.divergence.tensor_range import (
    floating_tensors,
    nonfinite_names,
)
from mmstabvim.engine.runner_access import (
    as_if_resumed,
    bare_model,
    hooks_of,
    optim_wrappers,
)

FILE_NAME = 'last_good.pth'


def save_last_good(runner: Runner, epoch: int, iteration: int) -> bool:
    """Replace the rolling checkpoint, if what it would hold is finite.

    The file appears whole or not at all: it is written under another name
    first.

    Args:
        runner (Runner): In training.
        epoch (int): Number of finished epochs.
        iteration (int): Number of finished iterations.

    Returns:
        bool: False where weights or the optimizer's state are not finite.
    """
    if _nonfinite_state(runner):
        return False
    part = f'{FILE_NAME}.part'
    runner.save_checkpoint(
        runner.work_dir,
        part,
        meta=dict(epoch=epoch, iter=iteration),
        by_epoch=False,
    )
    if is_main_process():
        path = Path(runner.work_dir, FILE_NAME)
        os.replace(path.with_name(part), path)
    return True


def remove_last_good(runner: Runner) -> None:
    """Remove the rolling checkpoint of a run that has ended well."""
    if is_main_process():
        Path(runner.work_dir, FILE_NAME).unlink(missing_ok=True)


def _nonfinite_state(runner: Runner) -> list[str]:
    """List weights and optimizer states that are not finite."""
    named: list[tuple[str, Tensor]] = [
        *bare_model(runner.model).state_dict().items()
    ]
    for wrapper in optim_wrappers(runner.optim_wrapper):
        for state in wrapper.optimizer.state.values():
            named += floating_tensors(state)
    return nonfinite_names(
        (name, value) for name, value in named if isinstance(value, Tensor)
    )


def find_last_good(runner: Runner) -> tuple[str, int] | None:
    """Find the newest checkpoint that is whole and finite.

    Args:
        runner (Runner): In training; asked on the main process.

    Returns:
        tuple[str, int] | None: Path and number of finished iterations, of
        the rolling checkpoint or of that of a ``CheckpointHook``, whichever
        is newer; None where there is neither.
    """
    best: tuple[str, int] | None = None
    for path in _candidates(runner):
        if not os.path.isfile(path):
            continue
        try:
            checkpoint = load_everything(path)
        except ValueError:  # damaged
            continue
        iteration = checkpoint['meta']['iter']
        usable = 'optimizer' in checkpoint and not nonfinite_names(
            floating_tensors(checkpoint['state_dict'])
        )
        if usable and (best is None or iteration > best[1]):
            best = path, iteration
    return best


def _candidates(runner: Runner) -> Iterator[str]:
    """Yield the paths at which this run may have left a checkpoint."""
    yield os.path.join(runner.work_dir, FILE_NAME)
    for hook in hooks_of(runner, CheckpointHook):
        if hook.last_ckpt:
            yield str(hook.last_ckpt)


def roll_back(runner: Runner, path: str | None) -> None:
    """Take weights and the state of training from a checkpoint, in place.

    Model, optimizer state, loss scale, logged histories and what hooks keep
    (a moving average, say) become those of the file. Iteration, epoch,
    position in the schedule, settings of the optimizer and random numbers
    go on, as does the data loader.

    Args:
        runner (Runner): In training, on every rank.
        path (str, optional): Checkpoint of this run, needed on the main
            process only.
    """
    loaded = [load_everything(path) if is_main_process() else None]
    broadcast_object_list(loaded)
    checkpoint: Any = loaded[0]
    # the generators go on, so that the same numbers are not drawn again
    checkpoint.pop('random_state', None)
    # a moving average is taken from the file in a resumed run only
    with as_if_resumed(runner):
        runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
    bare_model(runner.model).load_state_dict(checkpoint['state_dict'])
    _load_optimizer_state(runner, checkpoint['optimizer'])
    _load_histories(runner, checkpoint['message_hub']['log_scalars'])


def _load_optimizer_state(runner: Runner, state: dict[str, Any]) -> None:
    """Load the optimizer's state and keep its settings, as scheduled."""
    wrappers = optim_wrappers(runner.optim_wrapper)
    kept = [
        {key: value for key, value in group.items() if key != 'params'}
        for wrapper in wrappers
        for group in wrapper.param_groups
    ]
    runner.optim_wrapper.load_state_dict(state)
    groups = [g for wrapper in wrappers for g in wrapper.param_groups]
    for group, settings in zip(groups, kept, strict=True):
        group.update(settings)
    for wrapper in wrappers:
        wrapper.optimizer.zero_grad(set_to_none=True)


def _load_histories(
    runner: Runner, histories: dict[str, HistoryBuffer]
) -> None:
    """Forget what training has logged since the checkpoint."""
    current = runner.message_hub.log_scalars
    for name in [name for name in current if name.startswith('train/')]:
        del current[name]
    for name, history in histories.items():
        if name.startswith('train/'):
            current[name] = history
