"""Put a loss on the parameters into the losses of any model."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from mmstabvim.engine.hooks.stabilizer_hook import (
    StabilizerHook,
    bare_model,
    find_matrices,
)
from mmstabvim.registry import HOOKS, MODELS


@HOOKS.register_module()
class StabilityLossHook(Hook):
    """Add ``loss_stab`` to what a model's ``forward(mode='loss')`` returns.

    So it is logged, counted in the total loss, and reduced as the other
    losses are, in MMPretrain, MMSegmentation and under distributed training.

    Args:
        **loss (Any): Arguments of :class:`mmstabvim.StabilityLoss`; ``type``
            names another loss that takes the model.

    Raises:
        ValueError: If an argument of the loss is out of range.
    """

    key = 'loss_stab'

    def __init__(self, **loss: Any) -> None:
        self.loss = MODELS.build({'type': 'mmstabvim.StabilityLoss', **loss})
        self._handle: Any = None

    def before_train(self, runner: Runner) -> None:
        """Hook into the model, below its wrapper for distributed training."""
        self._say_if_idle(runner)
        model = bare_model(runner.model)
        self.loss.to(next(model.parameters()).device)
        self._handle = model.register_forward_hook(
            self._add_loss, with_kwargs=True
        )

    def after_train(self, runner: Runner) -> None:
        """Unhook, so that a second run does not count the loss twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add_loss(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        mode = kwargs.get('mode', args[2] if len(args) > 2 else 'tensor')
        if mode != 'loss':
            return output
        if self.key in output:
            raise RuntimeError(
                f'the model returns a loss {self.key!r} of its own: '
                'StabilityLossHook cannot add another'
            )
        return {**output, self.key: self.loss(model)}

    def _say_if_idle(self, runner: Runner) -> None:
        """A penalty that can only be zero is worth a warning."""
        eps = getattr(self.loss, 'eps', None)
        if eps is None or getattr(self.loss, 'surrogate', None):
            return
        matrices = find_matrices(runner, type(self).__name__)
        reason = None
        if eps >= 0 and not any(m.can_be_unstable for m in matrices.values()):
            reason = (
                'the parametrization has negative real parts only, and eps '
                f'{eps} is not negative'
            )
        for hook in runner.hooks:
            if isinstance(hook, StabilizerHook) and hook.mode == 'project':
                limit = hook.rule.abscissa_limit
                if limit is not None and eps >= limit:
                    reason = (
                        f'{type(hook).__name__} has moved the parameters '
                        "before they are penalized; its mode='reparam' lets "
                        'both act'
                    )
        if reason:
            print_log(
                f'{type(self).__name__} is zero throughout: {reason}',
                logger='current',
                level=30,
            )
