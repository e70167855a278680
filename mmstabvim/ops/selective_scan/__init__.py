"""The selective scan of Mamba (arXiv:2312.00752), with a choice of backends.

``reference`` is the definition in differentiable PyTorch, ``cpu`` the same
function with a hand-written backward pass that stores states at chunk borders
only, ``triton`` that in kernels for a GPU. README.md beside this file derives
the backward pass.
"""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from mmstabvim.ops.selective_scan.discretization import B_DISCS
from mmstabvim.ops.selective_scan.function import (
    selective_scan_op,
    selective_scan_triton_op,
)
from mmstabvim.ops.selective_scan.reference import selective_scan_ref

__all__ = ['BACKENDS', 'selective_scan', 'selective_scan_ref']

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    'reference': selective_scan_ref,
    'cpu': selective_scan_op,
    'triton': selective_scan_triton_op,
}
ENVIRONMENT_VARIABLE = 'MMSTABVIM_BACKEND'

_announced: set[tuple[str, str]] = set()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    b_disc: str = 'euler',
    channels_last: bool = False,
    backend: str = 'auto',
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan, call-compatible with mamba_ssm's selective_scan_fn.

    With ``dt = softplus(delta + delta_bias)``, per channel::

        h[t] = exp(dt[t] A) h[t-1] + B_bar[t] u[t]
        out[t] = (sum_n C[t] h[t] + D u[t]) * silu(z[t])

    The state is kept in float32, or float64 where an input is wider,
    whatever autocast says.

    Args:
        u (Tensor): (batch, dim, length), input; float16, bfloat16, float32
            or float64.
        delta (Tensor): (batch, dim, length), step size in steps, before bias
            and softplus.
        A (Tensor): (dim, state), continuous-time diagonal, 1/step, real or
            complex. Complex: N stored modes stand for N conjugate pairs and
            the output is ``2 Re(sum C h)``.
        B (Tensor): Input matrix: constant (dim, state), or input-dependent
            (batch, state, length) or (batch, groups, state, length), where
            channel d uses group ``d // (dim / groups)``. With complex ``A``
            the constant form is complex; the others are complex, or real
            with interleaved (real, imaginary) pairs along a last axis of
            ``2 * length``.
        C (Tensor): Output matrix, as ``B``.
        D (Tensor, optional): (dim,), skip weight.
        z (Tensor, optional): Gate, as ``u``.
        delta_bias (Tensor, optional): (dim,).
        delta_softplus (bool): Apply softplus to the step size. Defaults to
            False.
        return_last_state (bool): Also return the last state. Defaults to
            False.
        reverse (bool): Walk from the last token to the first, as if every
            input were flipped along the tokens and the output flipped back.
            Defaults to False.
        b_disc (str): Discretization of B: ``'euler'`` (``dt B``, what Mamba
            and Vim compute) or ``'zoh'`` (zero-order hold). Defaults to
            ``'euler'``.
        channels_last (bool): ``u``, ``delta``, ``z`` and the output are
            (batch, length, dim), ``B`` and ``C`` (batch, length, state) or
            (batch, length, groups, state), complex where ``A`` is. Defaults
            to False.
        backend (str): ``'auto'``, ``'reference'``, ``'cpu'`` or ``'triton'``
            (float32 state, at most 64 modes; not yet tried on a GPU).
            ``'auto'`` obeys the environment variable MMSTABVIM_BACKEND, else
            is ``'cpu'``. Defaults to ``'auto'``.

    Returns:
        Tensor | tuple[Tensor, Tensor]: The output, shape and dtype of ``u``;
        with ``return_last_state`` also the state after the last token walked
        (token 0 with ``reverse``), (batch, dim, state), float32 or wider.

    Raises:
        TypeError: If a tensor has no floating dtype.
        ValueError: If shapes or devices do not fit, or a name is unknown.

    Source: arXiv:2312.00752, Algorithm 2.
    """
    if b_disc not in B_DISCS:
        raise ValueError(f'b_disc must be one of {B_DISCS}, got {b_disc!r}')
    tensors = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z)
    tensors['delta_bias'] = delta_bias
    _check_tensors(tensors)
    if not channels_last:
        u, delta = u.transpose(1, 2), delta.transpose(1, 2)
        z = None if z is None else z.transpose(1, 2)
    _check_shapes(u, delta, A, D, z, delta_bias)
    B = _canonical('B', B, u, A, channels_last)
    C = _canonical('C', C, u, A, channels_last)
    _check_groups(B, C, u.shape[-1])
    scan = BACKENDS[_resolve(backend, u.device)]
    out, last = scan(
        u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, b_disc
    )
    if z is not None:
        out = out * F.silu(z.to(out.dtype))
    out = out.to(u.dtype)
    if not channels_last:
        out = out.transpose(1, 2)
    return (out, last) if return_last_state else out


def _check_tensors(tensors: dict[str, Tensor | None]) -> None:
    """Every tensor floating and on one device; u, delta, z of rank 3."""
    device = tensors['u'].device  # type: ignore[union-attr]
    complex_a = tensors['A'].is_complex()  # type: ignore[union-attr]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        may_be_complex = name == 'A' or (name in 'BC' and complex_a)
        if not (
            tensor.is_floating_point()
            or (may_be_complex and tensor.is_complex())
        ):
            raise TypeError(
                f'{name} must have a {"real " * (not may_be_complex)}floating '
                f'dtype, got {tensor.dtype}'
            )
        if tensor.device != device:
            raise ValueError(
                f'{name} must be on the device of u ({device}), got '
                f'{tensor.device}'
            )
        if name in ('u', 'delta', 'z') and tensor.dim() != 3:
            raise ValueError(
                f'{name} must have three axes, got {tuple(tensor.shape)}'
            )


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    dim = u.shape[-1]
    if 0 in u.shape:
        raise ValueError(f'u must not be empty, got shape {tuple(u.shape)}')
    if A.dim() != 2 or A.shape[0] != dim or A.shape[1] < 1:
        raise ValueError(
            f'A must be (dim, state) with dim {dim} as u has, got '
            f'{tuple(A.shape)}'
        )
    for name, tensor in (('delta', delta), ('z', z)):
        if tensor is not None and tensor.shape != u.shape:
            raise ValueError(
                f'{name} must have the shape of u, but (batch, length, dim) '
                f'is {tuple(tensor.shape)} against {tuple(u.shape)}'
            )
    for name, tensor in (('D', D), ('delta_bias', delta_bias)):
        if tensor is not None and tensor.shape != (dim,):
            raise ValueError(
                f'{name} must be ({dim},), got {tuple(tensor.shape)}'
            )


def _canonical(
    name: str, matrix: Tensor, u: Tensor, A: Tensor, channels_last: bool
) -> Tensor:
    """B or C as (batch, length, groups, state) or constant (dim, state)."""
    given = tuple(matrix.shape)
    (batch, length, dim), state = u.shape, A.shape[1]
    wanted = _matrix_shapes(batch, length, dim, state, channels_last)
    error = ValueError(
        f'{name} must be {wanted}{", complex" if A.is_complex() else ""} '
        f'for u (batch {batch}, length {length}, dim {dim}) and A '
        f'{tuple(A.shape)}, got {given} {matrix.dtype}'
    )
    if matrix.dim() == 2:
        if given != (dim, state) or matrix.is_complex() != A.is_complex():
            raise error
        return matrix
    if matrix.dim() not in (3, 4):
        raise error
    if A.is_complex() and not matrix.is_complex():
        if channels_last or matrix.shape[-1] != 2 * length:
            raise error
        pairs = matrix.unflatten(-1, (length, 2))
        if pairs.dtype not in (torch.float32, torch.float64):
            pairs = pairs.float()
        matrix = torch.view_as_complex(pairs.contiguous())
    if not channels_last:
        matrix = matrix.movedim(-1, 1)
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(2)
    if (*matrix.shape[:2], matrix.shape[3]) != (batch, length, state):
        raise error
    return matrix


def _check_groups(B: Tensor, C: Tensor, dim: int) -> None:
    groups = [m.shape[2] for m in (B, C) if m.dim() == 4]
    wrong = any(g == 0 or dim % g for g in groups)
    if wrong or len({g for g in groups if g > 1}) > 1:
        raise ValueError(
            f'B and C must have the same number of groups, one that divides '
            f'dim {dim}, or one group; got {groups}'
        )


def _matrix_shapes(
    batch: int, length: int, dim: int, state: int, channels_last: bool
) -> str:
    constant = f'(dim, state) = ({dim}, {state})'
    if channels_last:
        return (
            f'{constant}, (batch, length, state) = '
            f'({batch}, {length}, {state}) or (batch, length, groups, state)'
        )
    return (
        f'{constant}, (batch, state, length) = ({batch}, {state}, {length}) '
        'or (batch, groups, state, length)'
    )


def _resolve(backend: str, device: torch.device) -> str:
    """Name of the backend: the argument, the environment, the device."""
    chosen, source = backend, 'backend'
    if chosen == 'auto':
        chosen = os.environ.get(ENVIRONMENT_VARIABLE, 'auto')
        source = ENVIRONMENT_VARIABLE
    if chosen == 'auto':
        chosen = 'cpu'
    if chosen not in BACKENDS:
        raise ValueError(
            f'{source} must be one of {("auto", *BACKENDS)}, got {chosen!r}'
        )
    if not torch.compiler.is_compiling():
        _announce(chosen, device.type)
    return chosen


def _announce(backend: str, device_type: str) -> None:
    """Say once per device what was picked."""
    if (backend, device_type) in _announced:
        return
    _announced.add((backend, device_type))
    slow = device_type == 'cuda' and backend in ('cpu', 'reference')
    print_log(
        f'selective_scan uses the {backend!r} backend on {device_type}'
        + (': plain PyTorch operations, slow on a GPU' if slow else ''),
        logger='current',
        level=30 if slow else 20,
    )
