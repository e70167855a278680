"""What the hooks that act inside each optimizer step have in common."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.optim import Optimizer


class AfterStepHook(Hook):
    """Act after each optimizer step, and on averages before they are used.

    It uses the optimizer's own post-step hook: an iteration that accumulates
    gradients, or whose step fp16 training skips, calls nothing. Averages kept
    by ``EMAHook`` are seen before they are evaluated or saved.
    """

    # before EMAHook, whose averages are projected before it swaps them in
    priority = 'ABOVE_NORMAL'

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def act_on_average(self, runner: Runner, model: nn.Module) -> None:
        """Do to a model of averages what is done to the model."""

    def arm(self, optimizer: Optimizer, act: Callable[[], object]) -> None:
        """Call ``act`` after each step of an optimizer."""

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            # a fused optimizer is called for the steps that it skips, too
            found_inf = getattr(optimizer, 'found_inf', None)
            if found_inf is None or not bool(found_inf):
                act()

        self._handles.append(optimizer.register_step_post_hook(after_step))

    def after_train(self, runner: Runner) -> None:
        """Disarm, so that a second run does not act twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before_val_epoch(self, runner: Runner) -> None:
        """Act on the averages that EMAHook is about to swap in."""
        self._act_on_averages(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        """As before validation."""
        self._act_on_averages(runner)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Act on the averages that EMAHook is about to save."""
        self._act_on_averages(runner)

    def _act_on_averages(self, runner: Runner) -> None:
        for ema in averages_of(runner):
            self.act_on_average(runner, ema.module)


def averages_of(runner: Runner) -> Iterator[Any]:
    """The averaged models of a runner's ``EMAHook``."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook) and hasattr(hook, 'ema_model'):
            yield hook.ema_model


def optimizers_with(
    wrapper: Any, parameters: Iterable[Tensor]
) -> Iterator[Optimizer]:
    """The optimizers that train one of these parameters.

    Args:
        wrapper (OptimWrapper | OptimWrapperDict): Of the runner.
        parameters (Iterable[Tensor]): Some of the model's.
    """
    wanted = {id(p) for p in parameters}
    wrappers = (
        wrapper.values()
        if isinstance(wrapper, OptimWrapperDict)
        else [wrapper]
    )
    for one in wrappers:
        groups = one.optimizer.param_groups
        if any(id(p) in wanted for group in groups for p in group['params']):
            yield one.optimizer
