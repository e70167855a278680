"""Residual-add and norm on a GPU: launches the kernels of ``kernels.py``.

Tile sizes follow from the shape alone and every sum has a fixed order: the
same bits from run to run. Import this file only where it is used: it imports
triton.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from mmstabvim.ops.backend import launch
from mmstabvim.ops.rms_norm.kernels import _norm_bwd_kernel, _norm_fwd_kernel

TILE_NUMEL = 2048
"""Numbers in a tile, more only where a token has more channels."""

TILES = 4
"""Tiles of a program that adds up a part of the weight's gradient."""


@torch.no_grad()
def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute normalized tokens, and the stream: empty without a residual."""
    x = x.contiguous()
    normed = x.new_empty(x.shape, dtype=out_dtype)
    with_residual = residual is not None
    shape = x.shape if with_residual else (0,)
    stream = x.new_empty(shape, dtype=torch.float32)
    tile = tile_options(weight.numel())
    launch(
        _norm_fwd_kernel,
        (triton.cdiv(_tokens(x), tile['BLOCK_R']),),
        x,
        residual.contiguous() if residual is not None else None,
        weight.contiguous(),
        normed,
        stream if with_residual else None,
        _tokens(x),
        weight.numel(),
        eps,
        **tile,
    )
    return normed, stream


@torch.no_grad()
def backward(
    dnormed: Tensor,
    dstream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    split: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, of the residual, and of the weight.

    That of the residual is that of x in float32; without ``split`` it is
    empty.
    """
    stream = stream.contiguous()
    dx = stream.new_empty(stream.shape, dtype=x_dtype)
    shape = stream.shape if split else (0,)
    dresidual = stream.new_empty(shape, dtype=torch.float32)
    tile = tile_options(weight.numel())
    tokens, dim = _tokens(stream), weight.numel()
    programs = triton.cdiv(tokens, TILES * tile['BLOCK_R'])
    parts = stream.new_empty((programs, dim), dtype=torch.float32)
    launch(
        _norm_bwd_kernel,
        (programs,),
        dnormed.contiguous(),
        None if dstream is None else dstream.contiguous(),
        stream,
        weight.contiguous(),
        dx,
        dresidual if split else None,
        parts,
        tokens,
        dim,
        eps,
        TILES=TILES,
        **tile,
    )
    return dx, dresidual, parts.sum(0).to(weight.dtype)


def tile_options(dim: int) -> dict[str, Any]:
    """Choose tokens and channels of a tile, and the warps that hold it."""
    block_d = triton.next_power_of_2(dim)
    return dict(
        BLOCK_R=max(1, TILE_NUMEL // block_d),
        BLOCK_D=block_d,
        num_warps=min(16, max(4, block_d // 512)),
    )


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
