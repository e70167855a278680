# mypy: ignore-errors
"""Triton kernels of the root-mean-square norm of a residual stream.

With ``r = (mean(x**2) + eps)**-1/2`` over the channels of a token::

    normed = x r weight                       dweight = sum dnormed x r
    dx = r weight dnormed - x r**3 mean(weight dnormed x)

A tile is (BLOCK_R tokens, BLOCK_D channels), BLOCK_D at least all of them.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, offs, mask):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _norm_fwd_kernel(
    x_ptr,  # (tokens, dim)
    residual_ptr,  # (tokens, dim) or None
    weight_ptr,  # (dim,)
    normed_ptr,  # (tokens, dim)
    stream_ptr,  # (tokens, dim), float32, or None: x is the stream
    tokens, dim, eps,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64: x may have more than 2**31 elements
    row = tl.program_id(0).to(tl.int64) * BLOCK_R
    row += tl.arange(0, BLOCK_R)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < tokens) & (d < dim)
    offs = row * dim + d
    x = _load(x_ptr, offs, mask)
    if residual_ptr is not None:
        x += _load(residual_ptr, offs, mask)
        tl.store(stream_ptr + offs, x, mask=mask)
    rate = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / dim + eps)
    weight = _load(weight_ptr, d, d < dim)
    tl.store(normed_ptr + offs, x * rate * weight, mask=mask)


@triton.jit
def _norm_bwd_kernel(
    dnormed_ptr,  # (tokens, dim)
    dstream_ptr,  # (tokens, dim) or None
    stream_ptr, weight_ptr,  # as forward
    dx_ptr,  # (tokens, dim)
    dresidual_ptr,  # the same in float32, or None
    parts_ptr,  # (programs, dim): dweight
    tokens, dim, eps,
    TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first = program * (TILES * BLOCK_R) + tl.arange(0, BLOCK_R)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    weight = _load(weight_ptr, d, d < dim)
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for i in range(TILES):
        row = first + i * BLOCK_R
        mask = (row < tokens) & (d < dim)
        offs = row * dim + d
        x = _load(stream_ptr, offs, mask)
        dnormed = _load(dnormed_ptr, offs, mask)
        rate = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / dim + eps)
        x *= rate
        dweight += dnormed * x
        dnormed *= weight
        share = tl.sum(dnormed * x, 1, keep_dims=True) / dim
        dx = rate * (dnormed - x * share)
        if dstream_ptr is not None:
            dx += _load(dstream_ptr, offs, mask)
        tl.store(dx_ptr + offs, dx, mask=mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offs, dx, mask=mask)
    part = tl.sum(dweight, 0, keep_dims=True)
    tl.store(parts_ptr + program * dim + d, part, mask=d < dim)
