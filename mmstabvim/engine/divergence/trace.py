"""Find where the first non-finite number of a training step arises."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorRange:
    """Range of one tensor that a module reads, owns or makes.

    Attributes:
        module (str): Path of the module, ``''`` for the whole model.
        kind (str): Class of the module.
        role (str): ``'input'``, ``'parameter weight'``, ``'output[1]'``,
            ``'gradient of output'`` and so on.
        shape (tuple[int, ...]): Shape.
        dtype (str): Such as ``'float32'``.
        autocast (str): dtype of autocast at the time, or ``'off'``.
        minimum, maximum, mean_abs (float): Over the finite elements, NaN
            where there are none.
        nonfinite (float): Share of the elements that are NaN or infinite.
    """

    module: str
    kind: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    autocast: str
    minimum: float
    maximum: float
    mean_abs: float
    nonfinite: float

    @property
    def peak(self) -> float:
        """Largest finite absolute value."""
        return max(abs(self.minimum), abs(self.maximum))

    def describe(self) -> str:
        """Name the tensor in words."""
        owner = f'`{self.module}`' if self.module else 'the whole model'
        return f'{self.role} of {owner} ({self.kind})'


@dataclass
class Finding:
    """What a traced training step showed.

    Attributes:
        culprit (TensorRange, optional): The first tensor that is not finite;
            None if all are.
        reason (str): Where it arises, in words.
        before (list[TensorRange]): What the modules read and made until
            then, in order.
        outputs (list[TensorRange]): All outputs of modules, in order.
        losses (dict[str, float]): As returned by the model.
        parameters (list[str]): Parameters that are not finite.
        gradients (list[str]): Parameters whose gradient is not finite.
        error (str): Why the step could not be traced to its end, or empty.
    """

    culprit: TensorRange | None = None
    reason: str = ''
    before: list[TensorRange] = field(default_factory=list)
    outputs: list[TensorRange] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    error: str = ''


def largest_entry(tensors: Iterable[Tensor]) -> Tensor | None:
    """Largest absolute value, which is not finite if any entry is not.

    Nothing waits for the device.

    Args:
        tensors (Iterable[Tensor]): Floating or complex, any shapes.

    Returns:
        Tensor | None: A scalar, float32 or float64; None without tensors.
    """
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        if values.numel():
            key = values.device, values.dtype
            groups.setdefault(key, []).append(values.detach())
    peaks = [
        torch.stack(torch._foreach_norm(group, math.inf)).amax()
        for group in groups.values()
    ]
    if not peaks:
        return None
    double = any(peak.dtype == torch.float64 for peak in peaks)
    dtype = torch.float64 if double else torch.float32
    device = peaks[0].device
    return torch.stack([peak.to(device, dtype) for peak in peaks]).amax()


def floating_tensors(value: Any, path: str = '') -> Iterator[tuple]:
    """Walk tuples, lists and dicts for tensors that can be non-finite.

    Args:
        value (Any): What a module takes or returns.
        path (str): Put before the place. Defaults to ``''``.

    Yields:
        tuple[str, Tensor]: Place, such as ``'[1]'``, and tensor.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from floating_tensors(item, f'{path}[{key!r}]')
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            place = f'[{index}]' if len(value) > 1 else ''
            yield from floating_tensors(item, path + place)


def nonfinite_names(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of the tensors that are not finite.

    Waits for the device once if all are finite.

    Args:
        named (Iterable[tuple[str, Tensor]]): Names and tensors; None in the
            place of a tensor is passed over.

    Returns:
        list[str]: In the order given.
    """
    tensors = {
        name: tensor
        for name, tensor in named
        if tensor is not None
        and (tensor.is_floating_point() or tensor.is_complex())
    }
    if _is_finite(tensors.values()):
        return []
    return [n for n, tensor in tensors.items() if not _is_finite([tensor])]


def _is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries are finite; waits for the device once."""
    peak = largest_entry(tensors)
    return peak is None or math.isfinite(peak.item())


def trace_step(
    model: Any,
    batch: Any,
    context: Callable[[], AbstractContextManager] = nullcontext,
    scale: float = 1.0,
) -> Finding:
    """Run forward and backward and find the first non-finite number.

    Every module is watched, so that code between modules can be told from
    the modules themselves. Weights, buffers and gradients are afterwards what
    they were; random numbers are drawn.

    Args:
        model (BaseModel): Not wrapped for distributed training, in the mode
            in which it trains.
        batch (Any): As from the data loader.
        context (Callable): Returns the context of the forward pass, for
            instance autocast. Defaults to none.
        scale (float): Factor of the loss. Defaults to 1.0.

    Returns:
        Finding: What was found; an error in the model is noted, not raised.
    """
    trace = _Trace(model)
    finding = Finding(
        parameters=nonfinite_names(model.named_parameters()),
    )
    with _untouched(model), trace.watching():
        try:
            with context():
                data = model.data_preprocessor(batch, True)
                losses = model._run_forward(data, mode='loss')
            loss, named = model.parse_losses(losses)
            finding.losses = {k: v.item() for k, v in named.items()}
            trace.start_backward()
            (loss * scale).backward()
            finding.gradients = nonfinite_names(
                (name, p.grad) for name, p in model.named_parameters()
            )
        except Exception as error:
            finding.error = f'{type(error).__name__}: {error}'
    trace.conclude(finding)
    return finding


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


class _Trace:
    """Ranges of everything that modules read and make, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward: list[TensorRange] = []
        self.backward: list[TensorRange] = []
        self.harmless: set[int] = set()
        self._calls: list[int] = []
        self._in_backward = False
        self._handles: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook every module and parameter."""
        for name, module in self.model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(
                    partial(self._before, name), with_kwargs=True
                ),
                module.register_forward_hook(partial(self._after, name)),
            ]
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    role = f'gradient of parameter {key}'
                    self._watch_gradient(parameter, name, module, role)
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()

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
                self.forward.append(_measure(parameter, name, module, role))
        given = (*args, kwargs) if kwargs else args
        for place, tensor in floating_tensors(given, 'input'):
            self.forward.append(_measure(tensor, name, module, place))
        return self._viewed((args, kwargs), name, module)

    def _viewed(self, value: Any, name: str, module: nn.Module) -> Any:
        """Views of the inputs: their gradient is this module's part only."""
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
            measured = _measure(tensor, name, module, place)
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

        def measure(gradient: Tensor) -> None:
            self.backward.append(_measure(gradient, name, module, role))

        self._handles.append(tensor.register_hook(measure))

    def conclude(self, finding: Finding) -> None:
        """Fill in the culprit and the ranges."""
        finding.outputs = [
            item for item in self.forward if item.role.startswith('output')
        ]
        bad = [
            i
            for i, item in enumerate(self.forward)
            if item.nonfinite and i not in self.harmless
        ]
        if bad:
            self._blame_forward(finding, bad[0])
            return
        finding.before = self.forward
        for index, item in enumerate(self.backward):
            if item.nonfinite:
                finding.culprit = item
                finding.before = self.backward[:index] or self.forward
                finding.reason = _explain_gradient(item)
                return

    def _blame_forward(self, finding: Finding, index: int) -> None:
        """Name the tensor, or the parameter that its module has used."""
        culprit = self.forward[index]
        finding.before = self.forward[:index]
        finding.culprit = culprit
        unread = self._unread_weight(culprit, finding.before)
        if unread is not None:
            finding.culprit = unread
        finding.reason = _explain(self.model, finding.culprit, finding.before)

    def _unread_weight(
        self, culprit: TensorRange, before: list[TensorRange]
    ) -> TensorRange | None:
        """A weight that is not finite of a module that was not called.

        Functional code reads those: that of the module whose output is not
        finite, or of the parent of the module whose input is not.
        """
        if culprit.role.startswith('parameter') or _is_batch(culprit):
            return None
        place = culprit.module
        if culprit.role.startswith('input'):
            place = place.rpartition('.')[0]
        called = {culprit.module, *(item.module for item in before)}
        module = self.model.get_submodule(place)
        for name in nonfinite_names(module.named_parameters()):
            owner, _, key = name.rpartition('.')
            path = '.'.join(filter(None, (place, owner)))
            if path not in called:
                return _measure(
                    module.get_parameter(name),
                    path,
                    module.get_submodule(owner),
                    f'parameter {key}',
                )
        return None


def _explain(
    model: nn.Module, culprit: TensorRange, before: list[TensorRange]
) -> str:
    """Say where a number of the forward pass becomes non-finite."""
    if culprit.role.startswith('parameter'):
        return 'The weights themselves are not finite.'
    if culprit.role.startswith('output'):
        if next(model.get_submodule(culprit.module).children(), None) is None:
            return 'Everything that the module has read is finite.'
        return (
            'What it and its children have read and made is finite: it '
            "arises in the module's own code, after its last child."
        )
    if _is_batch(culprit):
        return 'The batch itself is not finite.'
    parent = culprit.module.rpartition('.')[0] or 'the whole model'
    outputs = [b for b in before if b.role.startswith('output')]
    after = f', after `{outputs[-1].module}`' if outputs else ''
    return f'It arises in the code of the parent, {parent}{after}.'


def _is_batch(culprit: TensorRange) -> bool:
    """Whether it is what the data loader has given."""
    outermost = culprit.module in ('', 'data_preprocessor')
    return outermost and culprit.role.startswith('input')


def _explain_gradient(culprit: TensorRange) -> str:
    """Say where a gradient becomes non-finite."""
    if culprit.role.startswith('gradient of output'):
        return (
            'The forward pass is finite. The gradient arises in the '
            "backward pass of the code that reads this module's output."
        )
    return (
        'The forward pass is finite, and so is the gradient that reached '
        "the module: it arises in the module's own backward pass."
    )


def _measure(
    tensor: Tensor, name: str, module: nn.Module, role: str
) -> TensorRange:
    """Measure one tensor; waits for the device."""
    values = tensor.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype != torch.float64:
        values = values.float()
    values = values[torch.isfinite(values)]
    size = tensor.numel() * (2 if tensor.is_complex() else 1)
    minimum = maximum = mean_abs = math.nan
    if values.numel():
        mean = values.abs().mean(dtype=torch.float64)
        minimum, maximum, mean_abs = torch.stack(
            [values.amin().double(), values.amax().double(), mean]
        ).tolist()
    return TensorRange(
        name,
        type(module).__name__,
        role,
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix('torch.'),
        _autocast(tensor.device.type),
        minimum,
        maximum,
        mean_abs,
        1 - values.numel() / size if size else 0.0,
    )


def _autocast(device_type: str) -> str:
    """Name the dtype of autocast, 'off' without it."""
    if not torch.is_autocast_enabled(device_type):
        return 'off'
    dtype = torch.get_autocast_dtype(device_type)
    return str(dtype).removeprefix('torch.')


def without_reproduction(
    finding: Finding, model: nn.Module, place: str, role: str
) -> Finding:
    """Name what the step itself has shown where its replay is finite.

    Args:
        finding (Finding): Of the replay.
        model (nn.Module): Not wrapped.
        place (str): Path of a module.
        role (str): Which of its tensors.

    Returns:
        Finding: With a culprit without a range.
    """
    culprit = TensorRange(
        place,
        type(model.get_submodule(place)).__name__,
        role,
        (),
        'unknown',
        'unknown',
        math.nan,
        math.nan,
        math.nan,
        math.nan,
    )
    reason = (
        'Seen in the step itself; a replay of the same batch with the same '
        'random numbers is finite, so the cause lies outside of the model '
        '(other code, timing, or the device).'
    )
    return replace(finding, culprit=culprit, reason=reason)
