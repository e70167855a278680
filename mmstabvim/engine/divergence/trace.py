"""Find where the first non-finite number of a training step arises."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmstabvim.engine.divergence.tensor_range import (
    TensorRange,
    floating_tensors,
    measure,
    nonfinite_names,
)
from mmstabvim.engine.runner_access import forward_losses
from mmstabvim.hook_handles import HookHandles


@dataclass
class StepTrace:
    """Ranges of all tensors of one training step, in order.

    Attributes:
        first_nonfinite (TensorRange, optional): The first tensor that is not
            finite; None if all are.
        reason (str): The place where it arises, in words.
        before (list[TensorRange]): Tensors that the modules read and returned
            until then.
        outputs (list[TensorRange]): All outputs of modules.
        losses (dict[str, float]): Losses of the batch, by name.
        parameters (list[str]): Parameters that are not finite.
        gradients (list[str]): Parameters whose gradient is not finite.
        error (str): The error that ended the step early, or empty.
    """

    first_nonfinite: TensorRange | None = None
    reason: str = ''
    before: list[TensorRange] = field(default_factory=list)
    outputs: list[TensorRange] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    error: str = ''


def trace_step(
    model: Any,
    batch: Any,
    context: Callable[[], AbstractContextManager] = nullcontext,
    scale: float = 1.0,
) -> StepTrace:
    """Trace a training step of a model of mmengine.

    Args:
        model (BaseModel): Not wrapped for distributed training, in the mode
            in which it trains.
        batch (Any): Batch of a data loader.
        context (Callable): Returns the context of the forward pass, for
            instance autocast. Defaults to none.
        scale (float): Factor of the loss. Defaults to 1.0.

    Returns:
        StepTrace: See :func:`trace_loss`; with the losses of the batch.
    """
    losses: dict[str, float] = {}

    def compute_loss() -> Tensor:
        with context():
            found = forward_losses(model, batch)
        loss, named = model.parse_losses(found)
        losses.update({k: v.item() for k, v in named.items()})
        return loss

    return replace(trace_loss(model, compute_loss, scale), losses=losses)


def trace_loss(
    model: nn.Module, compute_loss: Callable[[], Tensor], scale: float = 1.0
) -> StepTrace:
    """Run forward and backward and find the first non-finite number.

    Every module is watched, so that code between modules can be told from
    the modules themselves. Weights, buffers and gradients are afterwards what
    they were; random numbers are drawn.

    Args:
        model (nn.Module): Any model, in the mode in which it trains.
        compute_loss (Callable[[], Tensor]): Calls the model and returns a
            scalar that has a gradient.
        scale (float): Factor of the loss. Defaults to 1.0.

    Returns:
        StepTrace: An error in the model is noted there, not raised.

    Example:
        >>> import torch
        >>> from mmstabvim.engine.divergence import trace_loss
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 2), torch.nn.Softplus()
        ... )
        >>> x = torch.tensor([[1.0, float('nan')]])
        >>> trace = trace_loss(model, lambda: model(x).sum())
        >>> trace.first_nonfinite.describe()
        'input of the whole model (Sequential)'
        >>> trace.reason
        'The batch itself is not finite.'
    """
    recorder = _Recorder(model)
    trace = StepTrace(parameters=nonfinite_names(model.named_parameters()))
    with _untouched(model), recorder.watching():
        try:
            loss = compute_loss()
            recorder.start_backward()
            (loss * scale).backward()
            trace.gradients = nonfinite_names(
                (name, p.grad) for name, p in model.named_parameters()
            )
        except Exception as error:
            trace.error = f'{type(error).__name__}: {error}'
    recorder.conclude(trace)
    return trace


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put buffers and gradients back as they were."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)


class _Recorder:
    """Ranges of everything that modules read and return, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward: list[TensorRange] = []
        self.backward: list[TensorRange] = []
        self.harmless: set[int] = set()
        self._calls: list[int] = []
        self._in_backward = False
        self._handles = HookHandles()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook every module and parameter."""
        with self._handles:
            for name, module in self.model.named_modules():
                self._handles.add(
                    module.register_forward_pre_hook(
                        partial(self._before, name), with_kwargs=True
                    ),
                    module.register_forward_hook(partial(self._after, name)),
                )
                for key, parameter in module.named_parameters(recurse=False):
                    if parameter.requires_grad:
                        role = f'gradient of parameter {key}'
                        self._watch_gradient(parameter, name, module, role)
            yield

    def start_backward(self) -> None:
        """Ignore forward passes that checkpointing repeats from here on."""
        self._in_backward = True

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any):
        """Measure a module's own parameters and its inputs."""
        if self._in_backward:
            return None
        self._calls.append(len(self.forward))
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() or parameter.is_complex():
                role = f'parameter {key}'
                self.forward.append(measure(parameter, name, module, role))
        given = (*args, kwargs) if kwargs else args
        for place, tensor in floating_tensors(given, 'input'):
            self.forward.append(measure(tensor, name, module, place))
        return self._viewed((args, kwargs), name, module)

    def _viewed(self, value: Any, name: str, module: nn.Module) -> Any:
        """Replace inputs by views, whose gradient is this module's part."""
        if isinstance(value, Tensor):
            if not value.requires_grad or not torch.is_grad_enabled():
                return value
            view = value.view_as(value)
            self._watch_gradient(view, name, module, 'gradient of input')
            return view
        # not their subclasses, which may want other arguments
        if type(value) in (tuple, list, dict):
            if isinstance(value, dict):
                return {
                    k: self._viewed(v, name, module) for k, v in value.items()
                }
            return type(value)(self._viewed(v, name, module) for v in value)
        return value

    def _after(
        self, name: str, module: nn.Module, _args: Any, output: Any
    ) -> None:
        """Measure a module's outputs."""
        if self._in_backward:
            return
        start, count = self._calls.pop(), len(self.forward)
        clean = True
        for place, tensor in floating_tensors(output, 'output'):
            measured = measure(tensor, name, module, place)
            self.forward.append(measured)
            clean = clean and not measured.nonfinite
            if tensor.requires_grad:
                self._watch_gradient(
                    tensor, name, module, f'gradient of {place}'
                )
        if clean:
            # a mask of -inf, say, that the module has dealt with
            self.harmless.update(range(start, count))

    def _watch_gradient(
        self, tensor: Tensor, name: str, module: nn.Module, role: str
    ) -> None:
        """Measure the gradient of a tensor when it is computed."""

        def look(gradient: Tensor) -> None:
            self.backward.append(measure(gradient, name, module, role))

        self._handles.add(tensor.register_hook(look))

    def conclude(self, trace: StepTrace) -> None:
        """Fill in the first non-finite tensor and the ranges."""
        trace.outputs = [
            item for item in self.forward if item.role.startswith('output')
        ]
        bad = (
            i
            for i, item in enumerate(self.forward)
            if item.nonfinite and i not in self.harmless
        )
        index = next(bad, None)
        if index is not None:
            self._blame_forward(trace, index)
            return
        trace.before = self.forward
        for index, item in enumerate(self.backward):
            if item.nonfinite:
                trace.first_nonfinite = item
                trace.before = self.backward[:index] or self.forward
                trace.reason = _explain_gradient(item)
                return

    def _blame_forward(self, trace: StepTrace, index: int) -> None:
        """Name the tensor, or the parameter that its module has used."""
        first = self.forward[index]
        trace.before = self.forward[:index]
        first = self._unread_weight(first, trace.before) or first
        trace.first_nonfinite = first
        trace.reason = _explain(self.model, first, trace.before)

    def _unread_weight(
        self, first: TensorRange, before: list[TensorRange]
    ) -> TensorRange | None:
        """Find a non-finite weight of a module that was not called.

        Functional code reads such weights: the code of the module whose
        output is not finite, or of the parent of the module whose input is
        not.
        """
        if first.role.startswith('parameter') or _is_batch(first):
            return None
        place = first.module
        if first.role.startswith('input'):
            place = place.rpartition('.')[0]
        called = {first.module, *(item.module for item in before)}
        module = self.model.get_submodule(place)
        for name in nonfinite_names(module.named_parameters()):
            owner, _, key = name.rpartition('.')
            path = '.'.join(filter(None, (place, owner)))
            if path not in called:
                return measure(
                    module.get_parameter(name),
                    path,
                    module.get_submodule(owner),
                    f'parameter {key}',
                )
        return None


def _explain(
    model: nn.Module, first: TensorRange, before: list[TensorRange]
) -> str:
    """Say where a number of the forward pass becomes non-finite."""
    if first.role.startswith('parameter'):
        return 'The weights themselves are not finite.'
    if first.role.startswith('output'):
        if next(model.get_submodule(first.module).children(), None) is None:
            return 'Everything that the module has read is finite.'
        return (
            'All that it and its children have read and returned is finite: '
            "it arises in the module's own code, after its last child."
        )
    if _is_batch(first):
        return 'The batch itself is not finite.'
    parent = first.module.rpartition('.')[0] or 'the whole model'
    outputs = [b for b in before if b.role.startswith('output')]
    after = f', after `{outputs[-1].module}`' if outputs else ''
    return f'It arises in the code of the parent, {parent}{after}.'


def _is_batch(first: TensorRange) -> bool:
    """Tell a tensor that the data loader has given."""
    outermost = first.module in ('', 'data_preprocessor')
    return outermost and first.role.startswith('input')


def _explain_gradient(first: TensorRange) -> str:
    """Say where a gradient becomes non-finite."""
    if first.role.startswith('gradient of output'):
        return (
            'The forward pass is finite. The gradient arises in the '
            "backward pass of the code that reads this module's output."
        )
    return (
        'The forward pass is finite, and so is the gradient that reached '
        "the module: it arises in the module's own backward pass."
    )


def seen_in_step(
    trace: StepTrace, model: nn.Module, module: str, role: str
) -> StepTrace:
    """Name a tensor that was not finite in the step, but is in its replay.

    Args:
        trace (StepTrace): Trace of the replay.
        model (nn.Module): Not wrapped.
        module (str): Path of the module that the tensor belongs to.
        role (str): The tensor, as in :class:`TensorRange`.

    Returns:
        StepTrace: With a first non-finite tensor that has no range.
    """
    first = TensorRange(
        module,
        type(model.get_submodule(module)).__name__,
        role,
        (),
        'unknown',
        'unknown',
        *[math.nan] * 4,
    )
    reason = (
        'Seen in the step itself; a replay of the same batch with the same '
        'random numbers is finite, so the cause lies outside of the model '
        '(other code, timing, or the device).'
    )
    return replace(trace, first_nonfinite=first, reason=reason)
