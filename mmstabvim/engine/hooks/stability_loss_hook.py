"""Put a loss on parameters or changed images into those of any model."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from mmstabvim.engine.hooks.stabilizer_hook import (
    StabilizerHook,
    find_matrices,
)
from mmstabvim.engine.learning_rate_budget import say_if_out_of_reach
from mmstabvim.engine.runner_access import bare_model
from mmstabvim.registry import HOOKS, MODELS

CHECKPOINT_KEY = 'stability_losses'


@HOOKS.register_module()
class StabilityLossHook(Hook):
    """Add a loss to what a model's ``forward(mode='loss')`` returns.

    So it is logged, counted in the total loss, and reduced as the other
    losses are, in MMPretrain, MMSegmentation and under distributed training.
    Several of these hooks can add different losses; a loss that has a state,
    such as the vectors of a power iteration, has it in the checkpoint's entry
    ``stability_losses``.

    Args:
        loss (dict | nn.Module, optional): Another loss than
            :class:`mmstabvim.StabilityLoss`, such as
            ``dict(type='mmstabvim.JacobianLoss', loss_weight=0.01)``: a module
            that takes the model, and the images too where its attribute
            ``needs_inputs`` is true. Its attribute ``key`` is its name among
            the losses. Defaults to None.
        **arguments (Any): Arguments of :class:`mmstabvim.StabilityLoss`,
            called ``loss_stab``; not together with ``loss``.

    Raises:
        ValueError: If an argument of the loss is out of range, or both are
            given.
    """

    def __init__(
        self,
        loss: dict[str, Any] | nn.Module | None = None,
        **arguments: Any,
    ) -> None:
        if loss is not None and arguments:
            raise ValueError(
                'arguments of the loss belong into loss=dict(type=...), got '
                f'{sorted(arguments)} beside it'
            )
        if not isinstance(loss, nn.Module):
            settings = loss or arguments
            loss = MODELS.build(
                {'type': 'mmstabvim.StabilityLoss', **settings}
            )
        self.loss: Any = loss
        self.key = getattr(loss, 'key', 'loss_stab')
        self._handle: Any = None

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state of the loss, where it has one."""
        state = self.loss.state_dict()
        if state:
            states = checkpoint.setdefault(CHECKPOINT_KEY, {})
            states[self.key] = state

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        """Give the loss the state that it had."""
        state = checkpoint.get(CHECKPOINT_KEY, {}).get(self.key)
        if state:
            self.loss.load_state_dict(state)

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
        if not getattr(self.loss, 'needs_inputs', False):
            return {**output, self.key: self.loss(model)}
        inputs = kwargs.get('inputs', args[0] if args else None)
        return {**output, self.key: self.loss(model, inputs)}

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
        if reason is None:
            say_if_out_of_reach(
                runner, type(self).__name__, matrices, float(eps)
            )
        else:
            print_log(
                f'{type(self).__name__} is zero throughout: {reason}',
                logger='current',
                level=30,
            )
