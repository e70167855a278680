"""Convolution and SiLU on a GPU: launches the kernels of ``kernels.py``.

Tile sizes follow from the shape alone and every sum has a fixed order: the
same bits from run to run. Import this file only where it is used: it imports
triton.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from mmstabvim.ops.backend import launch
from mmstabvim.ops.causal_conv1d.fused import SHARED
from mmstabvim.ops.causal_conv1d.kernels import (
    _conv_bwd_kernel,
    _conv_fwd_kernel,
)

BLOCK_R = 4
"""Spans of a program, one for each of its warps."""

SPANS = (64, 32, 16)
"""Most tokens of a span: a longer one reads fewer neighbours' tokens and
leaves fewer parts of a sum, shorter ones make more programs."""

ENOUGH_PROGRAMS = 512
"""About four for each multiprocessor of a large GPU."""

FORWARD_OPTIONS: dict[str, Any] = dict(BLOCK_D=128, CHUNK=4, num_warps=BLOCK_R)
BACKWARD_OPTIONS: dict[str, Any] = dict(BLOCK_D=64, CHUNK=3, num_warps=BLOCK_R)
"""Channels of a tile and tokens in flight: what few registers hold."""


@torch.no_grad()
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: Sequence[bool],
    activation: str | None,
) -> Tensor:
    """Compute :func:`.reference.causal_conv1d_directions_ref`."""
    y = x.new_empty((len(reverse), *x.shape[-3:]))
    for x_k, k in _launches(x, reverse):
        parameters = _parameters(weight[k], bias, k)
        _forward(x_k, *parameters, y[k], reverse[k], activation)
    return y


@torch.no_grad()
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: Sequence[bool],
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, weight and bias (any, if it is absent)."""
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    dbias = weight.new_empty(weight.shape[:2])
    for i, (x_k, k) in enumerate(_launches(x, reverse)):
        parameters = _parameters(weight[k], bias, k)
        dx_k = dx if x.dim() == SHARED else dx[i]
        sums = _backward(dy[k], x_k, *parameters, dx_k, reverse[k], activation)
        dweight[k].copy_(sums[:, :-1].transpose(1, 2))
        dbias[k].copy_(sums[:, -1])
    return dx, dweight, dbias


def _launches(
    x: Tensor, reverse: Sequence[bool]
) -> Iterator[tuple[Tensor, slice]]:
    """Tokens, and the directions that read them in one launch."""
    if x.dim() == SHARED:
        yield _rows(x), slice(len(reverse))
    else:
        for k in range(len(reverse)):
            yield _rows(x[k]), slice(k, k + 1)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    reverse: Sequence[bool],
    activation: str | None,
) -> None:
    """Fill y (directions, batch, length, dim), contiguous, from one x."""
    blocks, span = tiling(*x.shape)
    launch(
        _conv_fwd_kernel,
        _grid(x, blocks, FORWARD_OPTIONS),
        x,
        weight,
        bias,
        y,
        *x.shape[1:],
        blocks,
        span,
        *x.stride()[:2],
        y.stride(0),
        **_constants(weight, reverse, activation),
        **FORWARD_OPTIONS,
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    reverse: Sequence[bool],
    activation: str | None,
) -> Tensor:
    """Fill dx, as one x; return the gradients of weight and bias.

    (directions, width + 1, dim), those of the bias last, in float32.
    """
    dy = _rows(dy)
    blocks, span = tiling(*x.shape)
    shape = (x.shape[0] * blocks, len(reverse), weight.shape[2] + 1)
    parts = x.new_empty((*shape, x.shape[2]), dtype=torch.float32)
    launch(
        _conv_bwd_kernel,
        _grid(x, blocks, BACKWARD_OPTIONS),
        dy,
        x,
        weight,
        bias,
        dx,
        parts,
        *x.shape[1:],
        blocks,
        span,
        *x.stride()[:2],
        *dy.stride()[:3],
        **_constants(weight, reverse, activation),
        **BACKWARD_OPTIONS,
    )
    return parts.sum(0)


def tiling(batch: int, length: int, dim: int) -> tuple[int, int]:
    """Choose programs along a sequence, and tokens of a span, nearly equal."""
    blocks_d = triton.cdiv(dim, BACKWARD_OPTIONS['BLOCK_D'])
    for most in SPANS:
        blocks = triton.cdiv(length, BLOCK_R * most)
        if batch * blocks * blocks_d >= ENOUGH_PROGRAMS:
            break
    return blocks, triton.cdiv(length, BLOCK_R * blocks)


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _parameters(
    weight: Tensor, bias: Tensor | None, k: slice
) -> tuple[Tensor, Tensor | None]:
    return weight.contiguous(), None if bias is None else bias[k].contiguous()


def _grid(x: Tensor, blocks: int, options: dict[str, Any]) -> tuple[int, int]:
    return x.shape[0] * blocks, triton.cdiv(x.shape[2], options['BLOCK_D'])


def _constants(
    weight: Tensor, reverse: Sequence[bool], activation: str | None
) -> dict[str, Any]:
    return dict(
        REVERSE=sum(1 << k for k, flag in enumerate(reverse) if flag),
        DIRECTIONS=len(reverse),
        WIDTH=weight.shape[2],
        SILU=activation == 'silu',
        BLOCK_R=BLOCK_R,
    )
