"""Checks and conversions that the functions on tensors share."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError where ``tensor`` has a NaN or an infinity.

    On a GPU this waits for the device.
    """
    bad = ~torch.isfinite(tensor)
    if bad.any():
        raise ValueError(
            f'{name} must be finite, got {int(bad.sum())} NaN or infinite '
            f'values of {tensor.numel()}'
        )


@torch.no_grad()
def count_nonfinite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Count the NaN and infinite elements of each tensor.

    Args:
        tensors (Mapping[str, Tensor]): By name, in the order of computation
            if the first culprit is to be told.

    Returns:
        dict[str, Tensor]: By name in the same order, int64 scalars on the
        tensors' devices. Nothing is replaced.

    Example:
        >>> count_nonfinite({'weight': torch.tensor([1.0, torch.nan])})
        {'weight': tensor(1)}
    """
    return {
        name: (~torch.isfinite(tensor)).sum()
        for name, tensor in tensors.items()
    }


def check_square(name: str, A: Tensor) -> None:
    """Raise ValueError unless ``A`` is (..., N, N) with N > 0."""
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
        raise ValueError(
            f'{name} must be (..., N, N) with N > 0, got {tuple(A.shape)}'
        )


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}')


def real_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Real dtype of a result: float32, or float64 if an input is wider."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype.to_real())
    return dtype


def to_float(x: Tensor) -> Tensor:
    """Widen a real tensor to float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def real_part(x: Tensor) -> Tensor:
    """Real part of a real or complex tensor, in float32 or wider."""
    return to_float(x.real if x.is_complex() else x)


def dense(name: str, A: Tensor) -> Tensor:
    """Check matrices and bring them to double precision on the CPU.

    LAPACK is quicker on these small matrices than a GPU is, which would
    have to wait for the host anyway.

    Args:
        name (str): Name of the argument, for the message.
        A (Tensor): (..., N, N), real or complex.

    Returns:
        Tensor: (..., N, N), float64 or complex128, differentiable.

    Raises:
        ValueError: If ``A`` is not square or not finite.
    """
    check_square(name, A)
    wide = torch.complex128 if A.is_complex() else torch.float64
    A = A.to('cpu', wide)
    check_finite(name, A)
    return A


def add_to_diagonal(A: Tensor, shift: Tensor) -> Tensor:
    """``A + shift I`` for (..., N, N) and one shift per matrix (...)."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return A + shift[..., None, None] * eye
