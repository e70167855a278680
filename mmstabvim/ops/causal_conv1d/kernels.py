# mypy: ignore-errors
"""Triton kernels of the causal convolution: all directions in one launch.

With x 0 outside the sequence, where i - k is the k-th token before i in the
order of the direction and i + k the k-th after it::

    pre[i] = bias + sum_k tap[k] x[i - k]        y[i] = silu(pre[i])
    g[i] = dy[i] silu'(pre[i])                  dx[i] = sum_k tap[k] g[i + k]
    dtap[k] = sum_i g[i] x[i - k]               dbias = sum_i g[i]

A program owns BLOCK_R spans of tokens, one below the other in a tile of
(BLOCK_R spans, BLOCK_D channels): a row is the same token of every span. Step
s looks at a window of x, tokens s - (WIDTH - 1) to s of a span. The past of
the last of them in one order is that of the first in the other: all
directions take their pre from the same window. At the same step the gradient
of its first token is complete. So a row is read once and held for WIDTH
steps. CHUNK steps are unrolled, with the rows of a chunk in flight together.
"""

import triton
import triton.language as tl

from mmstabvim.ops.silu_kernels import _silu, _silu_and_slope


@triton.jit
def _place(blocks, span, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sequence, first token of each span, and channels of this program."""
    program = tl.program_id(0)
    row = program % blocks * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    # int64: x may have more than 2**31 elements
    return (program // blocks).to(tl.int64), row * span, d


@triton.jit
def _load_rows(ptr, token, stride, length, mask_d, COUNT: tl.constexpr):
    """COUNT tokens of each span from ptr on, 0 outside."""
    rows = ()
    for j in tl.static_range(COUNT):
        mask = (token + j >= 0) & (token + j < length) & mask_d
        rows += (tl.load(ptr + j * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def _last(rows, COUNT: tl.constexpr, DROPPED: tl.constexpr):
    """COUNT rows, after the first DROPPED."""
    kept = ()
    for j in tl.static_range(COUNT):
        kept += (rows[DROPPED + j],)
    return kept


@triton.jit
def _load_taps(
    weight_ptr, bias_ptr, d, dim, mask,
    DIRECTIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Per direction WIDTH taps, that of the token itself first, and bias."""
    taps = ()
    for k in tl.static_range(DIRECTIONS):
        row = weight_ptr + (k * dim + d) * WIDTH
        for j in tl.static_range(WIDTH):
            tap = tl.load(row + (WIDTH - 1 - j), mask=mask, other=0.0)
            taps += (tap.to(tl.float32),)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + k * dim + d, mask=mask, other=0.0)
            taps += (bias.to(tl.float32),)
        else:
            taps += (tl.zeros(d.shape, tl.float32),)
    return taps


@triton.jit
def _convolve(
    x, taps, S: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Direction K at the end of window S that has the rest as its past."""
    pre = taps[K * (WIDTH + 1) + WIDTH]
    for j in tl.static_range(WIDTH):
        row = x[S + (j if REVERSE else WIDTH - 1 - j)].to(tl.float32)
        pre += taps[K * (WIDTH + 1) + j] * row
    return pre


@triton.jit
def _add_to_sums(
    sums, g, x, S: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Direction K's dtaps and dbias, with one more token."""
    new = ()
    for j in tl.static_range(WIDTH):
        row = x[S + (j if REVERSE else WIDTH - 1 - j)].to(tl.float32)
        new += (sums[K * (WIDTH + 1) + j] + g * row,)
    new += (sums[K * (WIDTH + 1) + WIDTH] + g,)
    return new


@triton.jit
def _add_to_dx(
    dx, g, taps, S: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr,
    DIRECTIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Contribution of direction K to the first token of window S."""
    for j in tl.static_range(WIDTH):
        dx += (
            taps[K * (WIDTH + 1) + j]
            * g[(S + (WIDTH - 1 - j if REVERSE else j)) * DIRECTIONS + K]
        )
    return dx


@triton.jit
def _conv_fwd_kernel(
    x_ptr,  # (batch, length, dim)
    weight_ptr,  # (directions, dim, width)
    bias_ptr,  # (directions, dim) or None
    y_ptr,  # (directions, batch, length, dim)
    length, dim, blocks, span,
    x_batch, x_token, y_direction,  # strides
    REVERSE: tl.constexpr,  # bit k: of direction k
    DIRECTIONS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, start, d = _place(blocks, span, BLOCK_R, BLOCK_D)
    mask_d = d < dim
    past: tl.constexpr = WIDTH - 1
    taps = _load_taps(weight_ptr, bias_ptr, d, dim, mask_d, DIRECTIONS, WIDTH)
    wide = tl.zeros((), tl.int64)
    direction, x_stride, y_stride = (
        wide + y_direction,
        wide + x_token,
        wide + dim,
    )
    x_ptr += batch * x_batch + start * x_stride + d
    y_ptr += (batch * length + start) * dim + d
    x = _load_rows(
        x_ptr - past * x_stride, start - past, x_stride, length, mask_d, past
    )
    for first in range(0, span + past, CHUNK):
        x += _load_rows(
            x_ptr + first * x_stride, start + first, x_stride, length, mask_d,
            CHUNK,
        )  # fmt: skip
        for s in tl.static_range(CHUNK):
            for k in tl.static_range(DIRECTIONS):
                y = _convolve(x, taps, s, k, REVERSE >> k & 1, WIDTH)
                if SILU:
                    y = _silu(y)
                i = first + (s - past if REVERSE >> k & 1 else s)
                own = (i >= 0) & (i < span) & (start + i < length)
                place = y_ptr + (k * direction + i * y_stride)
                tl.store(place, y, mask=own & mask_d)
        x = _last(x, past, CHUNK)


@triton.jit
def _conv_bwd_kernel(
    dy_ptr,  # (directions, batch, length, dim)
    x_ptr, weight_ptr, bias_ptr,  # as forward
    dx_ptr,  # (batch, length, dim)
    parts_ptr,  # (programs, directions, width + 1, dim): dweight, dbias
    length, dim, blocks, span,
    x_batch, x_token, dy_direction, dy_batch, dy_token,  # strides
    REVERSE: tl.constexpr,  # bit k: of direction k
    DIRECTIONS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, start, d = _place(blocks, span, BLOCK_R, BLOCK_D)
    mask_d = d < dim
    past: tl.constexpr = WIDTH - 1
    taps = _load_taps(weight_ptr, bias_ptr, d, dim, mask_d, DIRECTIONS, WIDTH)
    wide = tl.zeros((), tl.int64)
    direction, dx_stride = wide + dy_direction, wide + dim
    x_stride, dy_stride = wide + x_token, wide + dy_token
    x_ptr += batch * x_batch + start * x_stride + d
    dy_ptr += batch * dy_batch + start * dy_stride + d
    dx_ptr += (batch * length + start) * dim + d
    zero = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    sums, g = (), ()
    for _ in tl.static_range(DIRECTIONS * (WIDTH + 1)):
        sums += (zero,)
    for _ in tl.static_range(DIRECTIONS * past):
        g += (zero,)
    x = _load_rows(
        x_ptr - past * x_stride, start - past, x_stride, length, mask_d, past
    )
    for first in range(0, span + past, CHUNK):
        x += _load_rows(
            x_ptr + first * x_stride, start + first, x_stride, length, mask_d,
            CHUNK,
        )  # fmt: skip
        dy = ()
        for k in tl.static_range(DIRECTIONS):
            i = first - (past if REVERSE >> k & 1 else 0)
            dy += _load_rows(
                dy_ptr + (k * direction + i * dy_stride), start + i,
                dy_stride, length, mask_d, CHUNK,
            )  # fmt: skip
        for s in tl.static_range(CHUNK):
            dx, new = zero, ()
            for k in tl.static_range(DIRECTIONS):
                rate = dy[k * CHUNK + s].to(tl.float32)
                i = first + (s - past if REVERSE >> k & 1 else s)
                if SILU:
                    pre = _convolve(x, taps, s, k, REVERSE >> k & 1, WIDTH)
                    rate *= _silu_and_slope(pre)[1]
                g += (rate,)
                # neighbours' tokens lend their g to dx, no more
                rate = tl.where((i >= 0) & (i < span), rate, 0.0)
                new += _add_to_sums(
                    sums, rate, x, s, k, REVERSE >> k & 1, WIDTH
                )
                dx = _add_to_dx(
                    dx, g, taps, s, k, REVERSE >> k & 1, DIRECTIONS, WIDTH
                )
            sums = new
            i = first + (s - past)
            own = (i >= 0) & (i < span) & (start + i < length)
            tl.store(dx_ptr + i * dx_stride, dx, mask=own & mask_d)
        x = _last(x, past, CHUNK)
        g = _last(g, DIRECTIONS * past, DIRECTIONS * CHUNK)
    # in the order of the weight's columns, the token itself last
    part = tl.program_id(0).to(tl.int64) * DIRECTIONS * (WIDTH + 1) * dim
    for k in tl.static_range(DIRECTIONS):
        for j in tl.static_range(WIDTH + 1):
            row = k * (WIDTH + 1) + (past - j if j < WIDTH else WIDTH)
            total = tl.sum(sums[k * (WIDTH + 1) + j], 0, keep_dims=True)
            tl.store(parts_ptr + part + row * dim + d, total, mask=mask_d)
