"""The scan as a PyTorch operator, ``mmstabvim::selective_scan``."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmstabvim.ops.backend import Backends, no_derivative, not_narrow
from mmstabvim.ops.flops import count_flops
from mmstabvim.ops.operator import kernels, register
from mmstabvim.ops.selective_scan import fused
from mmstabvim.ops.selective_scan.inputs import ScanInputs

MAX_STATE = 64
"""States per channel that a tile of the Triton kernels can hold."""

MAX_DIRECTIONS = 31
"""Bits of the Triton kernels' mask of the directions' orders."""

# numbers for booleans: torch.jit.trace takes no list of bool
_INPUTS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, '
    'Tensor? delta_bias, bool delta_softplus, int[] reverse, str b_disc'
)


def _fused_check(*tensors: Tensor | None) -> Exception | None:
    return not_narrow('fused', *tensors, instead='cpu') or fused.refusal()


def _triton_check(
    u: Tensor, delta: Tensor, A: Tensor, *others: Tensor | None
) -> Exception | None:
    """Refuse what the kernels would compute wrongly or not at all."""
    if A.shape[2] > MAX_STATE:
        return ValueError(
            f'the triton backend takes at most {MAX_STATE} states, got A '
            f"{tuple(A.shape)}; use backend='cpu', which runs on any device"
        )
    if len(u) > MAX_DIRECTIONS:
        return ValueError(
            f'the triton backend takes at most {MAX_DIRECTIONS} directions, '
            f'got {len(u)}; call it for some at a time'
        )
    return not_narrow('triton', u, delta, A, *others, instead='cpu')


BACKENDS = Backends(
    'selective_scan',
    {
        'cpu': lambda *tensors: None,
        'fused': _fused_check,
        'triton': _triton_check,
    },
    slow_on_gpu=True,
)

_scan = register(
    __package__,
    'selective_scan',
    f'{_INPUTS}, bool keep_states',
    '(Tensor, Tensor, Tensor)',
    lambda kernels, *args: kernels.forward(_inputs(args[:-1]), args[-1]),
)
_backward = register(
    __package__,
    'selective_scan_backward',
    f'Tensor dy, Tensor? dlast, Tensor borders, {_INPUTS}',
    f'({", ".join(["Tensor"] * 7)})',
    lambda kernels, *args: kernels.backward(*args[:3], _inputs(args[3:])),
)


def scan_op(inputs: ScanInputs, backend: str) -> tuple[Tensor, Tensor]:
    """Call the operator.

    Args:
        inputs (ScanInputs): Inputs of the scan.
        backend (str): ``'cpu'``, ``'fused'`` or ``'triton'``.

    Returns:
        tuple[Tensor, Tensor]: As :func:`.reference.scan_ref`.
    """
    *others, reverse, b_disc = inputs
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs.tensors
    )
    y, last, _ = _scan(*others, list(map(int, reverse)), b_disc, keep, backend)
    return y, last


def _inputs(args: Sequence[Any]) -> ScanInputs:
    *others, reverse, b_disc = args
    return ScanInputs._make((*others, tuple(map(bool, reverse)), b_disc))


@_scan.register_fake
def _fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, keep_states, backend = args
    given, module = _inputs(inputs), kernels(__package__, backend)
    u, state = given.u, given.A.shape[2]
    borders = module.borders_shape(given, keep_states)
    return (
        u.new_empty(u.shape, dtype=module.output_dtype(given)),
        u.new_empty((*u.shape[:2], u.shape[3], state), dtype=given.wide),
        u.new_empty(borders, dtype=given.wide),
    )


@_backward.register_fake
def _backward_fake(
    dy: Tensor, dlast: Tensor | None, borders: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *inputs, backend = args
    given = _inputs(inputs)
    narrow = kernels(__package__, backend).output_dtype(given)
    dtypes = (narrow,) * 2 + (given.wide,) * 3 + (given.real,) * 2
    return tuple(
        given.u.new_empty((0,) if x is None else x.shape, dtype=dtype)
        for x, dtype in zip(given.tensors, dtypes, strict=True)
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    *tensors, softplus, reverse, b_disc, _, backend = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.options = (softplus, reverse, b_disc, backend)
    ctx.output_dtype = output[0].dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _autograd(
    ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    borders, *tensors = ctx.saved_tensors
    if not borders.numel():
        raise RuntimeError(
            'the graph of selective_scan was recorded without gradients: '
            'record it with inputs that require them'
        )
    if dy is None:
        dy = torch.zeros_like(tensors[0], dtype=ctx.output_dtype)
    grads = _backward(dy, dlast, borders, *tensors, *ctx.options)
    return (
        *(
            None if x is None else grad.to(x.dtype)
            for grad, x in zip(grads, tensors, strict=True)
        ),
        *(None,) * 5,
    )


_scan.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(no_derivative('selective_scan'))


def scan_flops(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> int:
    """Count the floating-point operations of one forward scan.

    Counted per (batch, token, channel, state): ``delta A``, ``exp``,
    ``(delta u) B``, multiply and add into the state, multiply and add into
    the output: 7; per (batch, token, channel): softplus 3, ``delta u`` 1,
    ``D u`` 2. A complex multiplication counts 6, an addition 2, ``exp`` 8;
    a product of a real and a complex number 2.

    Args:
        u (Tensor): (..., batch, length, dim).
        delta (Tensor): Shape of ``u``.
        A (Tensor): (..., dim, state).
        *others (Any): The operator's other inputs.

    Returns:
        int: Operations; one multiply-add counts as two.
    """
    per_state = 2 + 8 + 2 + (6 + 2) + (6 + 2) if A.is_complex() else 7
    return math.prod(u.shape) * (per_state * A.shape[-1] + 6)


def _backward_flops(
    dy: Tensor, dlast: Tensor | None, borders: Tensor, *inputs: Any
) -> int:
    """Recompute the forward pass and take about twice its operations."""
    return 3 * scan_flops(*inputs)


count_flops('selective_scan', scan_flops, _backward_flops)
