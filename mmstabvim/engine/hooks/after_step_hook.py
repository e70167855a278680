"""Base class of the hooks that act inside each optimizer step."""

from collections.abc import Callable
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.optim import Optimizer

from mmstabvim.engine.runner_access import averages_of
from mmstabvim.hook_handles import HookHandles


class AfterStepHook(Hook):
    """Act after each optimizer step, and on averages before they are used.

    It uses the optimizer's own post-step hook: an iteration that accumulates
    gradients, or whose step fp16 training skips, calls nothing. Averages kept
    by ``EMAHook`` are seen before they are evaluated or saved.
    """

    # before EMAHook, whose averages are projected before it swaps them in
    priority = 'ABOVE_NORMAL'

    def __init__(self) -> None:
        self._handles = HookHandles()

    def act_on_average(self, runner: Runner, model: nn.Module) -> None:
        """Do to a model of averages what is done to the model."""

    def arm(self, optimizer: Optimizer, act: Callable[[], None]) -> None:
        """Call ``act`` after each step of an optimizer."""

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            # a fused optimizer is called for the steps that it skips, too
            found_inf = getattr(optimizer, 'found_inf', None)
            if found_inf is None or not bool(found_inf):
                act()

        self._handles.add(optimizer.register_step_post_hook(after_step))

    def after_train(self, runner: Runner) -> None:
        """Disarm, so that a second run does not act twice."""
        self._handles.close()

    def before_val_epoch(self, runner: Runner) -> None:
        """Act on the averages that EMAHook is about to swap in."""
        self._act_on_averages(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        """Act on averages before a test, too."""
        self._act_on_averages(runner)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Act on the averages that EMAHook is about to save."""
        self._act_on_averages(runner)

    def _act_on_averages(self, runner: Runner) -> None:
        for ema in averages_of(runner):
            self.act_on_average(runner, ema.module)
