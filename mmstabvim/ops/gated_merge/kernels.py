# mypy: ignore-errors
"""Triton kernels of the gated merge, ``out = sum_k y[k] * silu(z) / DIVISOR``.

A program owns a tile of (BLOCK_L tokens, BLOCK_D channels) of a sequence.
"""

import triton
import triton.language as tl

from mmstabvim.ops.silu_kernels import _silu, _silu_and_slope


@triton.jit
def _place(blocks, length, dim, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sequence, tokens and channels of this program, and their mask."""
    # int64: y may have more than 2**31 elements
    program = tl.program_id(0).to(tl.int64)
    t = program % blocks * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return program // blocks, t, d, (t < length) & (d < dim)


@triton.jit
def _sum_directions(ptr, stride, mask, DIRECTIONS: tl.constexpr):
    total = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, DIRECTIONS):
        ptr += stride
        total += tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _merge_fwd_kernel(
    y_ptr,  # (directions, batch, length, dim)
    z_ptr,  # (batch, length, dim)
    out_ptr,  # as z, contiguous
    length, dim, blocks,
    y_direction, y_batch, y_token, z_batch, z_token,  # strides
    DIRECTIONS: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, t, d, mask = _place(blocks, length, dim, BLOCK_L, BLOCK_D)
    z_ptr += batch * z_batch + t * z_token + d
    z = tl.load(z_ptr, mask=mask, other=0.0).to(tl.float32)
    y_ptr += batch * y_batch + t * y_token + d
    total = _sum_directions(y_ptr, y_direction, mask, DIRECTIONS)
    out = total * _silu(z) / DIVISOR
    tl.store(out_ptr + (batch * length + t) * dim + d, out, mask=mask)


@triton.jit
def _merge_bwd_kernel(
    dout_ptr, y_ptr, z_ptr,  # as forward
    dy_ptr, dz_ptr,  # (batch, length, dim), contiguous
    length, dim, blocks,
    dout_batch, dout_token,  # strides
    y_direction, y_batch, y_token, z_batch, z_token,
    DIRECTIONS: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, t, d, mask = _place(blocks, length, dim, BLOCK_L, BLOCK_D)
    z_ptr += batch * z_batch + t * z_token + d
    z = tl.load(z_ptr, mask=mask, other=0.0).to(tl.float32)
    dout_ptr += batch * dout_batch + t * dout_token + d
    dout = tl.load(dout_ptr, mask=mask, other=0.0).to(tl.float32) / DIVISOR
    y_ptr += batch * y_batch + t * y_token + d
    total = _sum_directions(y_ptr, y_direction, mask, DIRECTIONS)
    value, slope = _silu_and_slope(z)
    place = (batch * length + t) * dim + d
    tl.store(dy_ptr + place, dout * value, mask=mask)
    tl.store(dz_ptr + place, dout * total * slope, mask=mask)
