"""Watch loss, gradients and activations of training steps, on the device."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mmstabvim.engine.divergence.tensor_range import (
    floating_tensors,
    largest_entry,
)
from mmstabvim.engine.runner_access import loss_scaler
from mmstabvim.hook_handles import HookHandles


class StepWatch:
    """Largest loss, gradient and activation of every training step.

    The numbers stay on the device until somebody reads ``rows``. Gradients
    are looked at before they are clipped; those of a scaled loss are left to
    its scaler, which skips the step if they are not finite.

    Args:
        before_step (Callable[[], bool]): Called when the gradients of an
            optimizer step are there; returns False to leave the step out.
    """

    def __init__(self, before_step: Callable[[], bool]) -> None:
        self.rows: list[tuple[int, Tensor]] = []
        self.peaks: list[tuple[str, Tensor]] = []
        self.iteration = 0
        self.has_loss = False
        self.num_skipped = 0
        self._before_step = before_step
        self._taken: bool | Tensor = False
        self._armed = HookHandles()
        self._watched = HookHandles()

    def begin(self, iteration: int) -> None:
        """Start an iteration."""
        self.iteration, self.has_loss = iteration, False
        self.peaks.clear()

    def arm(self, wrappers: Iterable[OptimWrapper]) -> None:
        """Get between the model and its optimizers."""
        for wrapper in wrappers:
            self._replace(wrapper, 'update_params', self._update_params)
            self._replace(wrapper, 'step', self._step)
            self._armed.add(
                wrapper.optimizer.register_step_pre_hook(self._note_step)
            )

    def _replace(
        self, wrapper: OptimWrapper, name: str, function: Callable
    ) -> None:
        """Put a function around a method of one object."""
        original = getattr(wrapper, name)
        around = functools.partial(function, wrapper, original)
        functools.update_wrapper(around, original)
        if name in vars(wrapper):
            self._armed.callback(setattr, wrapper, name, original)
        else:
            self._armed.callback(delattr, wrapper, name)
        setattr(wrapper, name, around)

    def disarm(self) -> None:
        """Leave everything as it was."""
        self._watched.close()
        self._armed.close()

    def watch_activations(self, model: nn.Module) -> None:
        """Look at the outputs of all leaf modules in the next forward."""
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                look = functools.partial(self._look, name)
                self._watched.add(module.register_forward_hook(look))

    def _look(
        self, name: str, _module: nn.Module, _args: Any, output: Any
    ) -> None:
        peak = largest_entry(t for _, t in floating_tensors(output))
        if peak is not None:
            self.peaks.append((name, peak.float()))

    def first_bad_activation(self) -> str | None:
        """Path of the first leaf module whose output was not finite."""
        for name, peak in self.peaks:
            if not math.isfinite(peak.item()):
                return name
        return None

    def add_row(self, loss: Tensor) -> None:
        """Start the row of a step: loss, gradients, activations."""
        self._watched.close()
        value = loss.detach().float().mean()
        gradient = activation = value.new_zeros(())
        if self.peaks:
            peaks = [peak.to(value.device) for _, peak in self.peaks]
            activation = torch.stack(peaks).amax()
        row = torch.stack([value, gradient, activation])
        self.rows.append((self.iteration, row))

    def _update_params(
        self,
        wrapper: OptimWrapper,
        original: Callable,
        loss: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Note the loss, update, and count float16 steps that are skipped."""
        self.add_row(loss)
        self.has_loss = True
        self._taken = False
        original(loss, *args, **kwargs)
        if loss_scaler(wrapper) is None or not wrapper.should_update():
            return
        self.num_skipped = 0 if bool(self._taken) else self.num_skipped + 1

    def _step(
        self, wrapper: OptimWrapper, original: Callable, **kwargs: Any
    ) -> None:
        """Note the gradients; take the step if nobody objects."""
        if loss_scaler(wrapper) is None:
            self._add_gradients(wrapper)
        if self._before_step():
            original(**kwargs)

    def _add_gradients(self, wrapper: OptimWrapper) -> None:
        peak = largest_entry(
            p.grad
            for group in wrapper.optimizer.param_groups
            for p in group['params']
            if p.grad is not None
        )
        if peak is None:
            return
        if not self.rows or self.rows[-1][0] != self.iteration:
            self.add_row(peak.new_zeros(()))
        self.rows[-1][1][1] = peak

    def _note_step(self, optimizer: Any, *_: Any) -> None:
        """Note a step; a fused optimizer is called for those it skips."""
        found_inf = getattr(optimizer, 'found_inf', None)
        self._taken = True if found_inf is None else found_inf == 0
