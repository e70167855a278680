"""The scan as a PyTorch operator: autograd, fake tensors, FLOP counts.

``mmstabvim::selective_scan`` is opaque to ``torch.compile`` (no graph break),
has shapes without data, and is seen by ``FlopCounterMode``.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.analysis import complexity_analysis
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmstabvim.ops.selective_scan import cpu
from mmstabvim.ops.selective_scan.reference import compute_dtype, num_groups

_INPUTS = (
    'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, '
    'Tensor? delta_bias, bool delta_softplus, bool reverse, str b_disc'
)


def _define(name: str, module: str) -> Any:
    """The operator ``mmstabvim::<name>`` from a module of this folder.

    The module is imported at the first call: triton is slow to import, and
    not everywhere.
    """

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return importlib.import_module(module, __package__).forward(*args)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        return importlib.import_module(module, __package__).backward(*args)

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
    scan.register_fake(_scan_fake)
    scan_backward.register_fake(_scan_backward_fake)
    scan.register_autograd(
        functools.partial(_autograd, scan_backward),
        setup_context=_setup_context,
    )
    return scan


def _scan_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _, _, _, keep_states = args
    u, _, A, B, C, *_ = tensors
    batch, length, dim = u.shape
    real, wide = _dtypes(tensors)
    chunks = -(-length // cpu.CHUNK) if keep_states else 0
    groups, state = num_groups(B, C), A.shape[1]
    borders = (chunks, batch, groups, state, dim // groups)
    return (
        u.new_empty((batch, length, dim), dtype=real),
        u.new_empty((batch, dim, state), dtype=wide),
        u.new_empty(borders, dtype=wide),
    )


def _scan_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors = args[3:-3]
    real, wide = _dtypes(tensors)
    dtypes = (real, real, wide, wide, wide, real, real)
    return tuple(
        tensors[0].new_empty((0,) if x is None else x.shape, dtype=dtype)
        for x, dtype in zip(tensors, dtypes, strict=True)
    )


def _dtypes(tensors: Sequence[Tensor | None]) -> tuple[torch.dtype, ...]:
    """Of u and what is real with it, and of A and what follows it."""
    real = compute_dtype(*tensors)
    a = tensors[2]
    complex_a = a is not None and a.is_complex()
    return real, real.to_complex() if complex_a else real


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, softplus, reverse, b_disc, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.options = (softplus, reverse, b_disc)
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
        dy = torch.zeros_like(tensors[0], dtype=_dtypes(tensors)[0])
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
        u_shape (tuple[int, ...]): (batch, length, dim).
        A_shape (tuple[int, ...]): (dim, state).
        complex_a (bool): Whether ``A`` is complex.

    Returns:
        int: Operations; one multiply-add counts as two.
    """
    tokens = u_shape[0] * u_shape[1] * u_shape[2]
    per_state = 2 + 8 + 2 + (6 + 2) + (6 + 2) if complex_a else 7
    return tokens * (per_state * A_shape[1] + 6)


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


# MMEngine offers no public way to teach get_model_complexity_info an operator
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(
    {
        'mmstabvim::selective_scan': _mmengine_formula,
        'mmstabvim::selective_scan_triton': _mmengine_formula,
    }
)


def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    b_disc: str,
    scan: Any = _scan,
) -> tuple[Tensor, Tensor]:
    """The operator, with the signature of ``selective_scan_ref``."""
    tensors = (u, delta, A, B, C, D, delta_bias)
    keep = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    y, last, _ = scan(*tensors, delta_softplus, reverse, b_disc, keep)
    return y, last


selective_scan_triton_op = functools.partial(
    selective_scan_op, scan=_scan_triton
)
