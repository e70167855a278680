"""The selective scan of Mamba (arXiv:2312.00752), with a choice of backends.

``reference`` is the definition in differentiable PyTorch, ``cpu`` the same
function with a hand-written backward pass that stores states at chunk borders
only, ``fused`` that in C++ for a CPU, ``triton`` that in kernels for a GPU.
README.md beside this file derives the backward pass.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmstabvim.ops.selective_scan.discretization import B_DISCS
from mmstabvim.ops.selective_scan.function import BACKENDS, scan_op
from mmstabvim.ops.selective_scan.inputs import ScanInputs
from mmstabvim.ops.selective_scan.reference import (
    scan_ref,
    selective_scan_ref,
)

__all__ = [
    'BACKENDS',
    'ScanInputs',
    'selective_scan',
    'selective_scan_directions',
    'selective_scan_ref',
]


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
    """Run a selective scan; takes mamba_ssm's selective_scan_fn's arguments.

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
        backend (str): ``'auto'``, ``'reference'``, ``'cpu'``, ``'fused'`` (a
            CPU with a compiler, float32 state) or ``'triton'`` (float32
            state, at most 64 modes). ``'auto'`` obeys the environment
            variable MMSTABVIM_BACKEND, else is ``'triton'`` on a GPU and
            elsewhere ``'fused'`` where it can run, else ``'cpu'``. Defaults
            to ``'auto'``.

    Returns:
        Tensor | tuple[Tensor, Tensor]: The output, shape and dtype of ``u``;
        with ``return_last_state`` also the state after the last token walked
        (token 0 with ``reverse``), (batch, dim, state), float32 or wider.

    Raises:
        NotImplementedError: If derivatives or transforms are asked for that
            only ``'reference'`` has: of second order, in forward mode, vmap.
        RuntimeError: If the backend cannot run here.
        TypeError: If a tensor's dtype does not fit.
        ValueError: If shapes or devices do not fit, or a name is unknown.

    Example:
        >>> u, A, B = torch.ones(1, 1, 3), torch.zeros(1, 1), torch.ones(1, 1)
        >>> selective_scan(u, u, A, B, B)  # no decay: a sum
        tensor([[[1., 2., 3.]]])

    Source: arXiv:2312.00752, Algorithm 2.
    """
    _check_b_disc(b_disc)
    _check_tensors(
        u, A, delta=delta, B=B, C=C, D=D, z=z, delta_bias=delta_bias
    )
    if not channels_last:
        u, delta = u.transpose(1, 2), delta.transpose(1, 2)
        z = None if z is None else z.transpose(1, 2)
    _check_shapes(u, delta, A, D, z, delta_bias)
    B = _canonical('B', B, u, A, channels_last)
    C = _canonical('C', C, u, A, channels_last)
    _check_groups(B, C, u.shape[-1])
    inputs = ScanInputs(
        u=u[None],
        delta=delta[None],
        A=A[None],
        B=B[None],
        C=C[None],
        D=None if D is None else D[None],
        delta_bias=None if delta_bias is None else delta_bias[None],
        delta_softplus=delta_softplus,
        reverse=(reverse,),
        b_disc=b_disc,
    )
    out, last = _scan(inputs, backend)
    out, last = out[0], last[0]
    if z is not None:
        out = out * F.silu(z.to(out.dtype))
    out = out.to(u.dtype)
    if not channels_last:
        out = out.transpose(1, 2)
    return (out, last) if return_last_state else out


def selective_scan_directions(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: Sequence[bool] = (False, True),
    b_disc: str = 'euler',
    backend: str = 'auto',
) -> Tensor:
    """Run several selective scans of one shape side by side, in one call.

    Entry ``k`` of the result is ``selective_scan(u[k], ...,
    reverse=reverse[k], channels_last=True)``: the two directions of a
    bidirectional layer in one launch.

    Args:
        u (Tensor): (directions, batch, length, dim), input.
        delta (Tensor): (directions, batch, length, dim), step size in steps,
            before bias and softplus.
        A (Tensor): (directions, dim, state), continuous-time diagonal,
            1/step, real or complex (see :func:`selective_scan`).
        B (Tensor): (directions, batch, length, groups, state), or constant
            (directions, dim, state); complex where ``A`` is.
        C (Tensor): As ``B``.
        D (Tensor, optional): (directions, dim), skip weight.
        delta_bias (Tensor, optional): (directions, dim).
        delta_softplus (bool): Apply softplus to the step size. Defaults to
            False.
        reverse (Sequence[bool]): Per direction, walk from the last token to
            the first. Defaults to ``(False, True)``.
        b_disc (str): ``'euler'`` or ``'zoh'``. Defaults to ``'euler'``.
        backend (str): As in :func:`selective_scan`. Defaults to ``'auto'``.

    Returns:
        Tensor: Shape and dtype of ``u``.

    Raises:
        RuntimeError: If the backend cannot run here.
        TypeError: If a tensor's dtype does not fit.
        ValueError: If shapes or devices do not fit, or a name is unknown.

    Example:
        >>> u, A = torch.ones(2, 1, 3, 1), torch.zeros(2, 1, 1)
        >>> B = torch.ones(2, 1, 1)
        >>> selective_scan_directions(u, u, A, B, B).squeeze()
        tensor([[1., 2., 3.],
                [3., 2., 1.]])
    """
    _check_b_disc(b_disc)
    inputs = ScanInputs(
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        reverse=tuple(map(bool, reverse)),
        b_disc=b_disc,
    )
    _check_directions(inputs)
    y, _ = _scan(inputs, backend)
    return y.to(u.dtype)


def _scan(inputs: ScanInputs, backend: str) -> tuple[Tensor, Tensor]:
    """All directions, and their last states."""
    chosen = BACKENDS.choose(backend, *inputs.tensors)
    if chosen == 'reference':
        return scan_ref(inputs)
    return scan_op(inputs, chosen)


def _check_b_disc(b_disc: str) -> None:
    if b_disc not in B_DISCS:
        raise ValueError(f'b_disc must be one of {B_DISCS}, got {b_disc!r}')


def _check_directions(inputs: ScanInputs) -> None:
    """Every tensor with its directions first; the rest by the first one."""
    directions = len(inputs.reverse)
    for name, x in zip(ScanInputs._fields, inputs.tensors, strict=False):
        if x is None:
            continue
        if x.dim() < 2 or len(x) != directions or not directions:
            raise ValueError(
                f'{name} must have the {directions} directions of reverse '
                f'first (at least one), got {tuple(x.shape)}'
            )
    u, delta, A, B, C = (
        x[0] for x in (inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C)
    )
    D, bias = (
        None if x is None else x[0] for x in (inputs.D, inputs.delta_bias)
    )
    _check_tensors(u, A, delta=delta, B=B, C=C, D=D, delta_bias=bias)
    _check_shapes(u, delta, A, D, None, bias)
    for name, matrix in (('B', B), ('C', C)):
        if matrix.dim() == 3:
            raise ValueError(
                f'{name} must be (directions, batch, length, groups, state) '
                'or (directions, dim, state), got '
                f'{(directions, *matrix.shape)}'
            )
        _canonical(name, matrix, u, A, True)
    _check_groups(B, C, u.shape[-1])


def _check_tensors(u: Tensor, A: Tensor, **others: Tensor | None) -> None:
    """Every tensor floating and on one device; u, delta, z of rank 3."""
    for name, tensor in dict(u=u, A=A, **others).items():
        if tensor is None:
            continue
        may_be_complex = name == 'A' or (name in 'BC' and A.is_complex())
        if not (
            tensor.is_floating_point()
            or (may_be_complex and tensor.is_complex())
        ):
            raise TypeError(
                f'{name} must have a {"real " * (not may_be_complex)}floating '
                f'dtype, got {tensor.dtype}'
            )
        if tensor.device != u.device:
            raise ValueError(
                f'{name} must be on the device of u ({u.device}), got '
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
