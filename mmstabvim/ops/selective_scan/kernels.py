"""Triton kernels of the selective scan; README.md here derives the formulas.

One program walks a block of channels of one sequence, token after token, the
state in registers: sums do not depend on the launch. Tiles are (BLOCK_N
states, BLOCK_D channels), so that a lane owns whole channels and only sums
over channels cross lanes. With COMPLEX a value is a pair of tiles, real and
imaginary part, without it one tile; the helpers hide which.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, offs, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        re = tl.load(ptr + 2 * offs, mask=mask, other=0.0)
        im = tl.load(ptr + 2 * offs + 1, mask=mask, other=0.0)
        return re.to(tl.float32), im.to(tl.float32)
    else:
        return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offs, x, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(ptr + 2 * offs, x[0], mask=mask)
        tl.store(ptr + 2 * offs + 1, x[1], mask=mask)
    else:
        tl.store(ptr + offs, x, mask=mask)


@triton.jit
def _zeros(
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COMPLEX: tl.constexpr
):
    zeros = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if COMPLEX:
        return zeros, zeros
    else:
        return zeros


@triton.jit
def _add(x, y, COMPLEX: tl.constexpr):
    if COMPLEX:
        return x[0] + y[0], x[1] + y[1]
    else:
        return x + y


@triton.jit
def _scale(x, real, COMPLEX: tl.constexpr):
    if COMPLEX:
        return x[0] * real, x[1] * real
    else:
        return x * real


@triton.jit
def _mul(x, y, COMPLEX: tl.constexpr):
    if COMPLEX:
        return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]
    else:
        return x * y


@triton.jit
def _conj(x, COMPLEX: tl.constexpr):
    if COMPLEX:
        return x[0], -x[1]
    else:
        return x


@triton.jit
def _sum_channels(x, COMPLEX: tl.constexpr):
    """(BLOCK_N, 1): sum over the channels of the block."""
    if COMPLEX:
        re = tl.sum(x[0], axis=1, keep_dims=True)
        return re, tl.sum(x[1], axis=1, keep_dims=True)
    else:
        return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def _dot_states(x, y, COMPLEX: tl.constexpr):
    """(1, BLOCK_D): real part of the sum of x y over the states."""
    product = x[0] * y[0] - x[1] * y[1] if COMPLEX else x * y
    return tl.sum(product, axis=0, keep_dims=True)


@triton.jit
def _cos_sin(x):
    """Error 1e-7 plus what rounding x costs; libdevice's is four times slower.

    The angle is reduced to the nearest quarter turn; pi / 2 is split in three
    summands, the first two so short that their multiples are exact.
    """
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    r = x - turns * 1.5703125
    r = r - turns * 4.837512969970703e-4
    r = r - turns * 7.549789948768648e-8
    s = r * r
    sin = 1 / 120 + s * (-1 / 5040 + s * (1 / 362880))
    sin = r + r * s * (-1 / 6 + s * sin)
    cos = 1 / 24 + s * (-1 / 720 + s * (1 / 40320))
    cos = 1.0 + s * (-1 / 2 + s * cos)
    quarter = turns - 4.0 * tl.floor(turns * 0.25)
    odd = (quarter == 1.0) | (quarter == 3.0)
    flip_cos = (quarter == 1.0) | (quarter == 2.0)
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(flip_cos, -x, x), tl.where(quarter >= 2.0, -y, y)


@triton.jit
def _decay(step, A, COMPLEX: tl.constexpr):
    """``exp(step A)``; exp2 is one instruction, and step the smaller tile."""
    if COMPLEX:
        size = tl.exp2((step * LOG2E) * A[0])
        cos, sin = _cos_sin(step * A[1])
        return size * cos, size * sin
    else:
        return tl.exp2((step * LOG2E) * A)


@triton.jit
def _add_one(x, COMPLEX: tl.constexpr):
    if COMPLEX:
        return x[0] + 1.0, x[1]
    else:
        return x + 1.0


@triton.jit
def _where(condition, x, y, COMPLEX: tl.constexpr):
    if COMPLEX:
        re = tl.where(condition, x[0], y[0])
        return re, tl.where(condition, x[1], y[1])
    else:
        return tl.where(condition, x, y)


@triton.jit
def _phi1_series(x, COMPLEX: tl.constexpr):
    """``(exp(x) - 1) / x`` and its derivative to 1e-8 for ``|x| < 1``."""
    slope = _scale(x, 0.0, COMPLEX)
    value = _add_one(slope, COMPLEX)
    for k in tl.static_range(12, 1, -1):
        slope = _add(value, _mul(x, slope, COMPLEX), COMPLEX)
        slope = _scale(slope, 1 / k, COMPLEX)
        value = _scale(_mul(x, value, COMPLEX), 1 / k, COMPLEX)
        value = _add_one(value, COMPLEX)
    return value, slope


@triton.jit
def _phi1(x, exp_x, COMPLEX: tl.constexpr):
    """``(exp(x) - 1) / x`` and its derivative; quotients cancel near 0."""
    size = x[0] * x[0] + x[1] * x[1] if COMPLEX else x * x
    near = size < 1.0
    zero = _scale(exp_x, 0.0, COMPLEX)
    value, slope = _phi1_series(_where(near, x, zero, COMPLEX), COMPLEX)
    if COMPLEX:
        divisor = tl.where(near, 1.0, size)
        inverse = x[0] / divisor, -x[1] / divisor
        less_one = exp_x[0] - 1.0, exp_x[1]
    else:
        inverse = 1.0 / tl.where(near, 1.0, x)
        less_one = exp_x - 1.0
    far = _mul(less_one, inverse, COMPLEX)
    rest = _add(exp_x, _scale(far, -1.0, COMPLEX), COMPLEX)
    far_slope = _mul(rest, inverse, COMPLEX)
    value = _where(near, value, far, COMPLEX)
    return value, _where(near, slope, far_slope, COMPLEX)


@triton.jit
def _softplus(x):
    """``log(1 + exp(x))``; the identity above 20, as the sum rounds to x."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    # the quotient makes up for what rounding took from w
    return tl.maximum(x, 0.0) + (tl.log(w) + (e - (w - 1.0)) / w)


@triton.jit
def _advance(h, step, u, A, B, ZOH: tl.constexpr, COMPLEX: tl.constexpr):
    """State after a token, ``exp(step A) h + B_bar u``."""
    decay = _decay(step, A, COMPLEX)
    drive = _scale(B, step * u, COMPLEX)
    if ZOH:
        gain, _ = _phi1(_scale(A, step, COMPLEX), decay, COMPLEX)
        drive = _mul(drive, gain, COMPLEX)
    return _add(_mul(decay, h, COMPLEX), drive, COMPLEX)


@triton.jit
def _load_optional(ptr, offs, mask):
    if ptr is not None:
        return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.zeros(offs.shape, tl.float32)


@triton.jit
def _load_token(u_ptr, delta_ptr, offs, bias, mask, SOFTPLUS: tl.constexpr):
    """Input and step size of a token, and the slope of the softplus."""
    u = _load(u_ptr, offs, mask, False)
    step = _load(delta_ptr, offs, mask, False) + bias
    if SOFTPLUS:
        return u, _softplus(step), tl.sigmoid(step)
    else:
        return u, step, 1.0


@triton.jit
def _tile(
    groups, channels, state, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Batch, group, states and channels (of the group) of this program."""
    # int64: u may have more than 2**31 elements
    sequence = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return sequence // groups, sequence % groups, n, d


@triton.jit
def _matrix_tile(
    batch, group, n, stride_batch, stride_group, offs_dn, mask_dn, mask_n,
    CONSTANT: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of B or C: of token 0, or of the constant matrix."""
    if CONSTANT:
        return offs_dn, mask_dn
    else:
        return batch * stride_batch + group * stride_group + n, mask_n


@triton.jit
def _adjoint(
    carry, before, step, u, dy, A, B, C,
    ZOH: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """One token back, from ``before``, the state that entered it.

    Returns the gradient of ``before`` and the token's gradients of step A,
    of step u (Euler) and, per channel, of B and C.
    """
    decay = _decay(step, A, COMPLEX)
    kept = _mul(decay, before, COMPLEX)
    drive = _scale(B, step * u, COMPLEX)
    dread = 2.0 * dy if COMPLEX else dy  # with the conjugate modes
    dh = _add(carry, _scale(_conj(C, COMPLEX), dread, COMPLEX), COMPLEX)
    carry = _mul(dh, _conj(decay, COMPLEX), COMPLEX)
    # from kept, the product: h - drive would cancel
    drate = _mul(dh, _conj(kept, COMPLEX), COMPLEX)
    if ZOH:
        gain, slope = _phi1(_scale(A, step, COMPLEX), decay, COMPLEX)
        weight = _conj(_mul(slope, drive, COMPLEX), COMPLEX)
        drate = _add(drate, _mul(dh, weight, COMPLEX), COMPLEX)
        drive = _mul(gain, drive, COMPLEX)
        dh = _mul(dh, _conj(gain, COMPLEX), COMPLEX)
    h = _add(kept, drive, COMPLEX)
    dx = _dot_states(dh, _conj(B, COMPLEX), COMPLEX)
    dB = _scale(dh, step * u, COMPLEX)
    return carry, drate, dx, dB, _scale(_conj(h, COMPLEX), dread, COMPLEX)


@triton.jit
def _collect(
    total, ptr, offs, x, mask, CONSTANT: tl.constexpr, COMPLEX: tl.constexpr
):  # fmt: skip
    """Add to the gradient of a constant matrix, or store one token's."""
    if CONSTANT:
        return _add(total, x, COMPLEX)
    else:
        _store(ptr, offs, _sum_channels(x, COMPLEX), mask, COMPLEX)
        return total


@triton.jit
def _scan_fwd_kernel(
    u_ptr, delta_ptr,  # (batch, length, dim)
    A_ptr,  # (dim, state)
    B_ptr, C_ptr,  # (batch, length, groups, state) or constant (dim, state)
    D_ptr, bias_ptr,  # (dim,) or None
    y_ptr,  # (batch, length, dim)
    last_ptr,  # (batch, dim, state)
    borders_ptr,  # (chunks, batch, groups, state, channels) or None
    length, groups, channels, state,
    B_batch, B_token, B_group,  # strides, 0 where constant
    C_batch, C_token, C_group,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ZOH: tl.constexpr,
    COMPLEX: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, group, n, d = _tile(groups, channels, state, BLOCK_N, BLOCK_D)
    mask_n, mask_d = n < state, d < channels
    mask = mask_n & mask_d
    dim = groups * channels
    channel = group * channels + d
    offs_dn = channel * state + n
    A = _load(A_ptr, offs_dn, mask, COMPLEX)
    offs_b, mask_b = _matrix_tile(
        batch, group, n, B_batch, B_group, offs_dn, mask, mask_n, CONSTANT_B
    )
    offs_c, mask_c = _matrix_tile(
        batch, group, n, C_batch, C_group, offs_dn, mask, mask_n, CONSTANT_C
    )
    D = _load_optional(D_ptr, channel, mask_d)
    bias = _load_optional(bias_ptr, channel, mask_d)
    states = ((batch * groups + group) * state + n) * channels + d
    all_states = tl.num_programs(0).to(tl.int64) * state * channels
    h = _zeros(BLOCK_N, BLOCK_D, COMPLEX)
    first = tl.full((), length - 1 if REVERSE else 0, tl.int64)
    for i in range(length):
        if borders_ptr is not None:  # noqa: SIM102 - one is compile-time
            if i % CHUNK == 0:
                border = states + i // CHUNK * all_states
                _store(borders_ptr, border, h, mask, COMPLEX)
        t = first - i if REVERSE else first + i
        offs = (batch * length + t) * dim + channel
        u, step, _ = _load_token(
            u_ptr, delta_ptr, offs, bias, mask_d, SOFTPLUS
        )
        B = _load(B_ptr, offs_b + t * B_token, mask_b, COMPLEX)
        h = _advance(h, step, u, A, B, ZOH, COMPLEX)
        C = _load(C_ptr, offs_c + t * C_token, mask_c, COMPLEX)
        y = _dot_states(h, C, COMPLEX)
        if COMPLEX:
            y *= 2.0  # with the conjugate modes
        tl.store(y_ptr + offs, y + D * u, mask=mask_d)
    _store(last_ptr, batch * dim * state + offs_dn, h, mask, COMPLEX)


@triton.jit
def _scan_bwd_kernel(
    dy_ptr,  # (batch, length, dim)
    dlast_ptr,  # (batch, dim, state) or None
    borders_ptr,  # (chunks, batch, groups, state, channels)
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr,  # as forward
    scratch_ptr,  # (CHUNK, batch, groups, state, channels)
    du_ptr, ddelta_ptr,  # (batch, length, dim)
    dA_ptr,  # (batch, dim, state)
    dB_ptr, dC_ptr,  # (blocks, batch, length, groups, state) or as dA
    dD_ptr, dbias_ptr,  # (batch, dim)
    length, groups, channels, state,
    B_batch, B_token, B_group,  # strides, 0 where constant
    C_batch, C_token, C_group,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ZOH: tl.constexpr,
    COMPLEX: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, group, n, d = _tile(groups, channels, state, BLOCK_N, BLOCK_D)
    mask_n, mask_d = n < state, d < channels
    mask = mask_n & mask_d
    dim = groups * channels
    channel = group * channels + d
    offs_dn = channel * state + n
    offs_sum = batch * dim * state + offs_dn
    A = _load(A_ptr, offs_dn, mask, COMPLEX)
    offs_b, mask_b = _matrix_tile(
        batch, group, n, B_batch, B_group, offs_dn, mask, mask_n, CONSTANT_B
    )
    offs_c, mask_c = _matrix_tile(
        batch, group, n, C_batch, C_group, offs_dn, mask, mask_n, CONSTANT_C
    )
    D = _load_optional(D_ptr, channel, mask_d)
    bias = _load_optional(bias_ptr, channel, mask_d)
    carry = _zeros(BLOCK_N, BLOCK_D, COMPLEX)
    dA, dB, dC = carry, carry, carry
    dD, dbias = tl.zeros_like(D), tl.zeros_like(D)
    if dlast_ptr is not None:
        carry = _load(dlast_ptr, offs_sum, mask, COMPLEX)
    states = ((batch * groups + group) * state + n) * channels + d
    all_states = tl.num_programs(0).to(tl.int64) * state * channels
    # rows of dB and dC: (block, batch, token 0, group)
    part = tl.program_id(1) * (tl.num_programs(0) // groups) + batch
    part = part * length * groups + group
    first = tl.full((), length - 1 if REVERSE else 0, tl.int64)
    chunks = tl.cdiv(length, CHUNK)
    for k in range(chunks):
        start = (chunks - 1 - k) * CHUNK
        count = tl.minimum(length - start, CHUNK)
        border = states + (chunks - 1 - k) * all_states
        h = _load(borders_ptr, border, mask, COMPLEX)
        tl.debug_barrier()  # the scratch has been read
        for j in range(count):
            slot = states + j * all_states
            _store(scratch_ptr, slot, h, mask, COMPLEX)
            t = first - start - j if REVERSE else first + start + j
            offs = (batch * length + t) * dim + channel
            u, step, _ = _load_token(
                u_ptr, delta_ptr, offs, bias, mask_d, SOFTPLUS
            )
            B = _load(B_ptr, offs_b + t * B_token, mask_b, COMPLEX)
            h = _advance(h, step, u, A, B, ZOH, COMPLEX)
        tl.debug_barrier()  # the scratch has been written
        for back in range(count):
            j = count - 1 - back
            slot = states + j * all_states
            before = _load(scratch_ptr, slot, mask, COMPLEX)
            t = first - start - j if REVERSE else first + start + j
            offs = (batch * length + t) * dim + channel
            u, step, slope = _load_token(
                u_ptr, delta_ptr, offs, bias, mask_d, SOFTPLUS
            )
            B = _load(B_ptr, offs_b + t * B_token, mask_b, COMPLEX)
            C = _load(C_ptr, offs_c + t * C_token, mask_c, COMPLEX)
            dy = _load(dy_ptr, offs, mask_d, False)
            carry, drate, dx, dB_t, dC_t = _adjoint(
                carry, before, step, u, dy, A, B, C, ZOH, COMPLEX
            )
            dA = _add(dA, _scale(drate, step, COMPLEX), COMPLEX)
            matrix = (part + t * groups) * state + n
            dB = _collect(
                dB, dB_ptr, matrix, dB_t, mask_n, CONSTANT_B, COMPLEX
            )
            dC = _collect(
                dC, dC_ptr, matrix, dC_t, mask_n, CONSTANT_C, COMPLEX
            )
            tl.store(du_ptr + offs, dx * step + D * dy, mask=mask_d)
            ddelta = _dot_states(drate, _conj(A, COMPLEX), COMPLEX) + dx * u
            ddelta *= slope
            tl.store(ddelta_ptr + offs, ddelta, mask=mask_d)
            dD += u * dy
            dbias += ddelta
    _store(dA_ptr, offs_sum, dA, mask, COMPLEX)
    if CONSTANT_B:
        _store(dB_ptr, offs_sum, dB, mask, COMPLEX)
    if CONSTANT_C:
        _store(dC_ptr, offs_sum, dC, mask, COMPLEX)
    tl.store(dD_ptr + batch * dim + channel, dD, mask=mask_d)
    tl.store(dbias_ptr + batch * dim + channel, dbias, mask=mask_d)
