"""Save and restore the random number generators with a checkpoint."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmstabvim.engine.random_state import get_random_state, set_random_state
from mmstabvim.registry import HOOKS


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Make a resumed run continue with the random numbers of the first.

    The states of Python's, NumPy's and PyTorch's generators are stored in
    each checkpoint and restored on resume. Validation does not advance them:
    they are put back after it. So on one process without loader workers a
    resumed run repeats an uninterrupted one bit by bit.

    The checkpoint holds the state of rank 0. Other ranks continue with
    generators seeded from it and their rank: different numbers from those of
    an uninterrupted run, but never those of another rank.
    """

    # before CheckpointHook (VERY_LOW), so that the state is taken first
    priority = 'NORMAL'

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._before_val: dict[str, Any] | None = None

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Store the state; during a validation the one from before it."""
        checkpoint['random_state'] = self._before_val or get_random_state()

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state until training starts."""
        self._loaded = checkpoint.get('random_state')

    def before_train_epoch(self, runner: Runner) -> None:
        """Restore, before the loader draws the order or the seeds."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or runner.iter == 0:  # not resumed
            return
        loop = runner.train_loop
        skips = not getattr(loop, 'fast_forward_on_resume', False)
        if skips and hasattr(loop, 'dataloader_iterator'):
            # an iteration-based loop skips the batches that were trained on,
            # without a hook between them and the next
            loop.dataloader_iterator = _RestoreAfter(
                loop.dataloader_iterator, runner.iter, loaded
            )
        else:
            _restore(loaded)

    def before_val(self, runner: Runner) -> None:
        """Remember the state of training."""
        self._before_val = get_random_state()

    def after_val(self, runner: Runner) -> None:
        """Put the state of training back."""
        if self._before_val is not None:
            set_random_state(self._before_val)
        self._before_val = None


def _restore(state: dict[str, Any]) -> None:
    """Restore; ranks other than 0 get numbers of their own."""
    set_random_state(state)
    rank = get_rank()
    if rank:
        seed = int(torch.randint(2**31, ())) + rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


class _RestoreAfter:
    """Batches of a training loop, restoring the state before one of them.

    Args:
        batches (Iterator): The loop's own.
        count (int): Number of batches before the state is restored.
        state (dict): Result of :func:`.get_random_state`.
    """

    def __init__(
        self, batches: Iterator[Any], count: int, state: dict[str, Any]
    ) -> None:
        self._batches, self._left, self._state = batches, count, state

    def __iter__(self) -> Iterator[Any]:
        """Return itself."""
        return self

    def __next__(self) -> Any:
        """Return the next batch, after the restoration where it is due."""
        if self._left == 0:
            _restore(self._state)
        self._left -= 1
        return next(self._batches)

    def skip_iter(self, count: int) -> None:
        """Skip batches without loading them: OneDL's loop asks for it."""
        batches: Any = self._batches
        batches.skip_iter(count)
        self._left -= count
        # else made by the next batch, and its seed drawn after the restoration
        batches._ensure_iterator()
