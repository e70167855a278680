"""Ranges of tensors, and the search for entries that are not finite."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorRange:
    """Range of one tensor that a module reads, owns or returns.

    Attributes:
        module (str): Path of the module, ``''`` for the whole model.
        kind (str): Class of the module.
        role (str): ``'input'``, ``'parameter weight'``, ``'output[1]'``,
            ``'gradient of output'`` and so on.
        shape (tuple[int, ...]): Shape.
        dtype (str): Name, such as ``'float32'``.
        autocast (str): dtype of autocast at the time, or ``'off'``.
        minimum, maximum, mean_abs (float): Statistics of the finite elements,
            NaN where there are none.
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


def measure(
    tensor: Tensor, name: str, module: nn.Module, role: str
) -> TensorRange:
    """Measure one tensor; waits for the device.

    Args:
        tensor (Tensor): Floating or complex, any shape.
        name (str): Path of its module.
        module (nn.Module): The module.
        role (str): See :class:`TensorRange`.
    """
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
        value (Any): Arguments or return value of a module.
        path (str): Prefix of the place. Defaults to ``''``.

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
    """List the names of the tensors that are not finite.

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
    """Tell if all entries are finite; waits for the device once."""
    peak = largest_entry(tensors)
    return peak is None or math.isfinite(peak.item())
