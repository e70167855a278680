"""The gated merge on a GPU: launches the kernels of ``kernels.py``.

Import this file only where it is used: it imports triton.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from mmstabvim.ops.backend import launch
from mmstabvim.ops.gated_merge.kernels import (
    _merge_bwd_kernel,
    _merge_fwd_kernel,
)

TILE: dict[str, Any] = dict(BLOCK_L=16, BLOCK_D=128, num_warps=4)
"""Tokens and channels of a program: 16 elements in each lane."""


@torch.no_grad()
def forward(y: Tensor, z: Tensor, divisor: int) -> Tensor:
    """Compute :func:`.reference.gated_merge_ref`."""
    y, z = _rows(y), _rows(z)
    out = y.new_empty(z.shape)
    launch(
        _merge_fwd_kernel,
        _grid(z),
        y,
        z,
        out,
        *_sizes(z),
        *y.stride()[:3],
        *z.stride()[:2],
        DIRECTIONS=len(y),
        DIVISOR=divisor,
        **TILE,
    )
    return out


@torch.no_grad()
def backward(
    dout: Tensor, y: Tensor, z: Tensor, divisor: int
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of any one direction of y, and of z."""
    dout, y, z = _rows(dout), _rows(y), _rows(z)
    dy, dz = y.new_empty(z.shape), z.new_empty(z.shape)
    launch(
        _merge_bwd_kernel,
        _grid(z),
        dout,
        y,
        z,
        dy,
        dz,
        *_sizes(z),
        *dout.stride()[:2],
        *y.stride()[:3],
        *z.stride()[:2],
        DIRECTIONS=len(y),
        DIVISOR=divisor,
        **TILE,
    )
    return dy, dz


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(z: Tensor) -> int:
    return int(triton.cdiv(z.shape[1], TILE['BLOCK_L']))


def _grid(z: Tensor) -> tuple[int, int]:
    return z.shape[0] * _blocks(z), triton.cdiv(z.shape[2], TILE['BLOCK_D'])


def _sizes(z: Tensor) -> tuple[int, int, int]:
    return z.shape[1], z.shape[2], _blocks(z)
