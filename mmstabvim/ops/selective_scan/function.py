"""The scan as a PyTorch operator: autograd, fake tensors, FLOP counts.

``mmstabvim::selective_scan`` is opaque to ``torch.compile`` (no graph break),
has shapes without data, and is seen by ``FlopCounterMode``.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmstabvim.ops.flops import teach_mmengine
from mmstabvim.ops.selective_scan.inputs import ScanInputs

_INPUTS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, '
    'Tensor? delta_bias, bool delta_softplus, int[] reverse, str b_disc'
)


def _define(name: str, module: str) -> Any:
    """The operator ``mmstabvim::<name>`` from a module of this folder.

    The module is imported at the first call: triton is slow to import, and
    not everywhere.
    """

    def backend() -> Any:
        return importlib.import_module(module, __package__)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        *inputs, keep_states = args
        return backend().forward(_inputs(inputs), keep_states)

    def backward(
        dy: Tensor, dlast: Tensor | None, borders: Tensor, *inputs: Any
    ) -> tuple[Tensor, ...]:
        return backend().backward(dy, dlast, borders, _inputs(inputs))

    def forward_fake(*args: Any) -> tuple[Tensor, ...]:
        given, keep_states = _inputs(args[:-1]), args[-1]
        u, state = given.u, given.A.shape[2]
        borders = backend().borders_shape(given, keep_states)
        return (
            u.new_empty(u.shape, dtype=backend().output_dtype(given)),
            u.new_empty((*u.shape[:2], u.shape[3], state), dtype=given.wide),
            u.new_empty(borders, dtype=given.wide),
        )

    def backward_fake(
        dy: Tensor, dlast: Tensor | None, borders: Tensor, *inputs: Any
    ) -> tuple[Tensor, ...]:
        given = _inputs(inputs)
        narrow = backend().output_dtype(given)
        dtypes = (narrow,) * 2 + (given.wide,) * 3 + (given.real,) * 2
        return tuple(
            given.u.new_empty((0,) if x is None else x.shape, dtype=dtype)
            for x, dtype in zip(given.tensors, dtypes, strict=True)
        )

    scan = torch.library.custom_op(
        f'mmstabvim::{name}',
        forward,
        mutates_args=(),
        schema=f'({_INPUTS}, bool keep_states) -> (Tensor, Tensor, Tensor)',
    )
    scan_backward = torch.library.custom_op(
        f'mmstabvim::{name}_backward',
        backward,
        mutates_args=(),
        schema=f'(Tensor dy, Tensor? dlast, Tensor borders, {_INPUTS}) -> '
        f'({", ".join(["Tensor"] * 7)})',
    )
    scan.register_fake(forward_fake)
    scan_backward.register_fake(backward_fake)
    scan.register_autograd(
        functools.partial(_autograd, scan_backward),
        setup_context=_setup_context,
    )
    return scan


def _inputs(args: Sequence[Any]) -> ScanInputs:
    *others, reverse, b_disc = args
    return ScanInputs._make((*others, tuple(map(bool, reverse)), b_disc))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, softplus, reverse, b_disc, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.options = (softplus, reverse, b_disc)
    ctx.output_dtype = output[0].dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _autograd(
    backward: Any,
    ctx: Any,
    dy: Tensor | None,
    dlast: Tensor | None,
    _: Tensor | None,
) -> tuple[Tensor | None, ...]:
    borders, *tensors = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0], dtype=ctx.output_dtype)
    grads = backward(dy, dlast, borders, *tensors, *ctx.options)
    return (
        *(
            None if x is None else grad.to(x.dtype)
            for grad, x in zip(grads, tensors, strict=True)
        ),
        None,
        None,
        None,
        None,
    )


_scan = _define('selective_scan', '.cpu')
_scan_triton = _define('selective_scan_triton', '.triton')


def scan_flops(
    u_shape: tuple[int, ...], A_shape: tuple[int, ...], complex_a: bool
) -> int:
    """Floating-point operations of one forward scan.

    Counted per (batch, token, channel, state): ``delta A``, ``exp``,
    ``(delta u) B``, multiply and add into the state, multiply and add into
    the output: 7; per (batch, token, channel): softplus 3, ``delta u`` 1,
    ``D u`` 2. A complex multiplication counts 6, an addition 2, ``exp`` 8;
    a product of a real and a complex number 2.

    Args:
        u_shape (tuple[int, ...]): (..., batch, length, dim).
        A_shape (tuple[int, ...]): (..., dim, state).
        complex_a (bool): Whether ``A`` is complex.

    Returns:
        int: Operations; one multiply-add counts as two.
    """
    per_state = 2 + 8 + 2 + (6 + 2) + (6 + 2) if complex_a else 7
    return math.prod(u_shape) * (per_state * A_shape[-1] + 6)


@register_flop_formula(
    [
        torch.ops.mmstabvim.selective_scan,
        torch.ops.mmstabvim.selective_scan_triton,
    ],
    get_raw=True,
)
def _forward_formula(
    u: Tensor, delta: Tensor, A: Tensor, *args: Any, **kwargs: Any
) -> int:
    return scan_flops(tuple(u.shape), tuple(A.shape), A.is_complex())


@register_flop_formula(
    [
        torch.ops.mmstabvim.selective_scan_backward,
        torch.ops.mmstabvim.selective_scan_triton_backward,
    ],
    get_raw=True,
)
def _backward_formula(
    dy: Tensor,
    dlast: Tensor | None,
    borders: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Recomputes the forward pass and takes about twice its operations."""
    return 3 * scan_flops(tuple(u.shape), tuple(A.shape), A.is_complex())


def _mmengine_formula(inputs: list[Any], outputs: list[Any]) -> int:
    """MMEngine's unit is the multiply-add: half of our operations."""
    u, A = inputs[0].type(), inputs[2].type()
    complex_a = A.dtype() is not None and A.dtype().is_complex
    return scan_flops(tuple(u.sizes()), tuple(A.sizes()), complex_a) // 2


for _name in ('selective_scan', 'selective_scan_triton'):
    teach_mmengine(f'mmstabvim::{_name}', _mmengine_formula)


def _scan_op(scan: Any, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The operator, with the signature of ``scan_ref``."""
    *others, reverse, b_disc = inputs
    keep = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in others
    )
    # numbers: torch.jit.trace takes no list of bool
    y, last, _ = scan(*others, list(map(int, reverse)), b_disc, keep)
    return y, last


scan_op = functools.partial(_scan_op, _scan)
scan_triton_op = functools.partial(_scan_op, _scan_triton)
