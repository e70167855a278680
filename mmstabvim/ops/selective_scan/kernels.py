"""Triton kernels of the selective scan; README.md here derives the formulas.

One program walks a span of the tokens of one direction of one sequence, for a
block of channels, the state in registers: sums do not depend on the launch.
Positions count tokens in the order of the walk; pointers to a token's numbers
move by a signed step, so that the order is data.

Tiles are (NR, NL, DL, DR): a lane holds NR states of DR channels, NL lanes
share a channel and DL lanes a state. Per-channel tiles repeat the NL axis
where they are loaded, so that loads already have the tile's distribution.
With COMPLEX a value is a pair of tiles, real and imaginary part, without it
one tile; the helpers hide which.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from mmstabvim.ops.selective_scan.kernels_math import (
    _add,
    _conj,
    _decay,
    _dot_states,
    _mul,
    _phi1,
    _scale,
    _softplus,
)

UNSPECIALIZED = ('directions', 'span', 'reverse', 'zero')
"""Arguments that are not compiled into a kernel where they are 1.

``zero`` is 0, which the compiler must not know: else it turns every address
of an unrolled loop into a pointer of its own to count up, a hundred registers
in the backward kernel.
"""


@triton.jit
def _load(ptr, mask, COMPLEX: tl.constexpr, AGAIN: tl.constexpr = False):
    """Float32 values; complex ones are pairs in memory.

    With AGAIN the compiler does not reuse an earlier load's values: it takes
    the default, spelled out, for another one.
    """
    CACHE: tl.constexpr = '.ca' if AGAIN else ''
    if COMPLEX:
        re = _load(ptr, mask, False, AGAIN)
        return re, _load(ptr + 1, mask, False, AGAIN)
    elif mask is None:
        return tl.load(ptr, cache_modifier=CACHE).to(tl.float32)
    else:
        x = tl.load(ptr, mask=mask, other=0.0, cache_modifier=CACHE)
        return x.to(tl.float32)


@triton.jit
def _store(ptr, x, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(ptr, x[0], mask=mask)
        tl.store(ptr + 1, x[1], mask=mask)
    else:
        tl.store(ptr, x, mask=mask)


@triton.jit
def _zeros(
    NR: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr, DR: tl.constexpr,
    COMPLEX: tl.constexpr,
):  # fmt: skip
    zeros = tl.zeros((NR, NL, DL, DR), tl.float32)
    if COMPLEX:
        return zeros, zeros
    else:
        return zeros


@triton.jit
def _step(delta, bias, SOFTPLUS: tl.constexpr):
    """Step size of a token, and its slope in delta."""
    if SOFTPLUS:
        return _softplus(delta + bias)
    else:
        return delta + bias, 1.0


@triton.jit
def _drive(step, u, A, B, decay, ZOH: tl.constexpr, COMPLEX: tl.constexpr):
    """Input of a token to the state, ``B_bar u``."""
    drive = _scale(B, step * u, COMPLEX)
    if ZOH:
        gain, _ = _phi1(_scale(A, step, COMPLEX), decay, COMPLEX)
        drive = _mul(drive, gain, COMPLEX)
    return drive


@triton.jit
def _load_optional(ptr, offs, mask):
    if ptr is not None:
        return _load(ptr + offs, mask, False)
    else:
        return tl.zeros(offs.shape, tl.float32)


@triton.jit
def _program(
    batch, length, groups, channels, span, reverse, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Find the tokens and channels of this program.

    Returns direction, sample, group, block of channels, the first token in
    memory's order, the order (1 or -1) and the number of tokens.
    """
    blocks = tl.cdiv(channels, BLOCK_D)
    block = tl.program_id(0) % blocks
    sequence = tl.program_id(0) // blocks
    group = sequence % groups
    sequence = sequence // groups
    direction = sequence // batch
    start = tl.program_id(1) * span
    backwards = ((reverse >> direction) & 1).to(tl.int32)
    first = start + backwards * (length - 1 - 2 * start)
    # int64: u may have more than 2**31 elements
    return (
        direction.to(tl.int64),
        (sequence % batch).to(tl.int64),
        group.to(tl.int64),
        block.to(tl.int64),
        first.to(tl.int64),
        (1 - 2 * backwards).to(tl.int64),
        tl.minimum(span, length - start),
    )


@triton.jit
def _tile(
    place,
    NR: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """States, and the group's channels, without and with the NL axis."""
    _, _, _, block, _, _, _ = place
    nr = tl.arange(0, NR)[:, None, None, None]
    nl = tl.arange(0, NL)[None, :, None, None]
    dl = tl.arange(0, DL)[None, None, :, None]
    dr = tl.arange(0, DR)[None, None, None, :]
    c = block.to(tl.int32) * (DL * DR) + dl * DR + dr
    n = nl * NR + nr
    return n, n + 0 * dl, c, c + 0 * nl


@triton.jit
def _numbers(
    place, groups, channels, STATE: tl.constexpr, COMPLEX: tl.constexpr,
    NR: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """Offsets of this program's numbers, and which of them are there.

    Returns the offsets of states and of channels within a token, without and
    with the NL axis, as :func:`_tile`; their masks, that of the tile last;
    the direction's first channel; the tile within a sequence's states, and
    within A.
    """
    direction, _, group, _, _, _, _ = place
    n, m, c, d = _tile(place, NR, NL, DL, DR)
    masks = n < STATE, c < channels, d < channels
    masks += ((n < STATE) & (d < channels),)
    WIDTH: tl.constexpr = 2 if COMPLEX else 1
    c, d = group.to(tl.int32) * channels + c, group.to(tl.int32) * channels + d
    weights = direction * (groups * channels)
    state = (d * STATE + n) * WIDTH
    A_row = weights * STATE * WIDTH + state
    return (n * WIDTH, m * WIDTH, c, d), masks, weights, state, A_row


@triton.jit
def _token(ptr, strides, place):
    """Pointer to the first token walked, and the step to the next."""
    direction, sample, _, _, first, order, _ = place
    start = direction * strides[0] + sample * strides[1] + first * strides[2]
    return ptr + start, (order * strides[2]).to(tl.int32)


@triton.jit
def _at(ptr, i, step):
    """Pointer i steps on."""
    return ptr + i.to(tl.int64) * step


@triton.jit
def _matrix(
    ptr, strides, place, offs_dn, mask,
    CONSTANT: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """B or C: of the first token, as :func:`_token`; or the constant tile."""
    if CONSTANT:
        return _load(ptr + offs_dn, mask, COMPLEX), 0
    else:
        _, _, group, _, _, _, _ = place
        return _token(ptr + group * strides[3], strides, place)


@triton.jit
def _entry(B, i, step, n, CONSTANT: tl.constexpr):
    """Pointer to B or C of token i, from the result of :func:`_matrix`."""
    if CONSTANT:
        return B
    else:
        return _at(B, i, step) + n


@triton.jit
def _read(B, mask, CONSTANT: tl.constexpr, COMPLEX: tl.constexpr):
    """B or C from where it is."""
    if CONSTANT:
        return B
    else:
        return _load(B, mask, COMPLEX)


@triton.jit
def _move(B, step, CONSTANT: tl.constexpr):
    """B or C of the next token."""
    if CONSTANT:
        return B
    else:
        return B + step


@triton.jit
def _advance(
    h, i, u_at, delta_at, B, u_step, delta_step, B_step, A, bias,
    d, c, n, mask_d, mask_c, mask_n,
    CONSTANT_B: tl.constexpr, SOFTPLUS: tl.constexpr, ZOH: tl.constexpr,
    COMPLEX: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """State after GROUP tokens, and the sum of their steps."""
    u_d, delta_c = _at(u_at, i, u_step) + d, _at(delta_at, i, delta_step) + c
    B_n = _entry(B, i, B_step, n, CONSTANT_B)
    tokens = ()
    for _j in tl.static_range(GROUP):
        B_j = _read(B_n, mask_n, CONSTANT_B, COMPLEX)
        u, delta = _load(u_d, mask_d, False), _load(delta_c, mask_c, False)
        tokens += ((u, delta, B_j),)
        u_d, delta_c = u_d + u_step, delta_c + delta_step
        B_n = _move(B_n, B_step, CONSTANT_B)
    total = tl.zeros_like(bias)
    for j in tl.static_range(GROUP):
        u, delta, B_j = tokens[j]
        step, _ = _step(delta, bias, SOFTPLUS)
        decay = _decay(step, A, COMPLEX)
        drive = _drive(step, u, A, B_j, decay, ZOH, COMPLEX)
        h = _add(_mul(decay, h, COMPLEX), drive, COMPLEX)
        total += step
    return h, total


@triton.jit
def _scan_group(
    h, i, u_at, delta_at, B, C, y_at,
    u_step, delta_step, B_step, C_step, y_step, A, D, bias,
    d, c, n, mask_d, mask_c, mask_n,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr,
    COMPLEX: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """State after GROUP tokens, whose outputs are stored.

    Their loads come before the stores, which they could not overtake.
    """
    u_d, delta_c = _at(u_at, i, u_step) + d, _at(delta_at, i, delta_step) + c
    y_d = _at(y_at, i, y_step) + d
    B_n = _entry(B, i, B_step, n, CONSTANT_B)
    C_n = _entry(C, i, C_step, n, CONSTANT_C)
    tokens = ()
    for _j in tl.static_range(GROUP):
        u, delta = _load(u_d, mask_d, False), _load(delta_c, mask_c, False)
        B_j = _read(B_n, mask_n, CONSTANT_B, COMPLEX)
        C_j = _read(C_n, mask_n, CONSTANT_C, COMPLEX)
        tokens += ((u, delta, B_j, C_j),)
        u_d, delta_c = u_d + u_step, delta_c + delta_step
        B_n = _move(B_n, B_step, CONSTANT_B)
        C_n = _move(C_n, C_step, CONSTANT_C)
    for j in tl.static_range(GROUP):
        u, delta, B_j, C_j = tokens[j]
        step, _ = _step(delta, bias, SOFTPLUS)
        decay = _decay(step, A, COMPLEX)
        drive = _drive(step, u, A, B_j, decay, ZOH, COMPLEX)
        h = _add(_mul(decay, h, COMPLEX), drive, COMPLEX)
        y = _dot_states(h, C_j, COMPLEX)
        if COMPLEX:
            y *= 2.0  # with the conjugate modes
        tl.store(y_d, y + D * u, mask=mask_d)
        y_d += y_step
    return h


@triton.jit
def _fold(
    carry, end_at, sum_at, end_step, sum_step, count, A, mask, mask_c,
    CONJUGATE: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Carry a state, or its gradient, over ``count`` spans, in their order.

    What leaves a span: what enters it, decayed by the sum of its steps, and
    what the span alone gives.
    """
    for _ in range(count):
        decay = _decay(_load(sum_at, mask_c, False), A, COMPLEX)
        if CONJUGATE:
            decay = _conj(decay, COMPLEX)
        end = _load(end_at, mask, COMPLEX)
        carry = _add(_mul(decay, carry, COMPLEX), end, COMPLEX)
        end_at += end_step
        sum_at += sum_step
    return carry


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _scan_ends_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, bias_ptr,  # as of _scan_fwd_kernel
    ends_ptr,  # (spans, directions, batch, dim, state)
    sums_ptr,  # (spans, directions, batch, dim)
    u_strides, delta_strides, B_strides,
    directions, batch, length, groups, channels, span, reverse, zero,
    STATE: tl.constexpr, WHOLE: tl.constexpr, CONSTANT_B: tl.constexpr,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, COMPLEX: tl.constexpr,
    GROUP: tl.constexpr,
    NR: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """Each span's last state from a zero state, and the sum of its steps."""
    place = _program(batch, length, groups, channels, span, reverse, DL * DR)
    direction, sample, _, _, _, _, count = place
    offsets, masks, weights, state, A_row = _numbers(
        place, groups, channels, STATE, COMPLEX, NR, NL, DL, DR
    )
    n, _m, c, d = offsets
    mask_n = None if STATE == NR * NL else masks[0]
    mask_c = None if WHOLE else masks[1]
    mask_d = None if WHOLE else masks[2]
    mask = None if WHOLE & (STATE == NR * NL) else masks[3]
    WIDTH: tl.constexpr = 2 if COMPLEX else 1
    dim = groups * channels
    A = _load(A_ptr + A_row, mask, COMPLEX)
    bias = _load_optional(bias_ptr, weights + c, mask_c)
    u_at, u_step = _token(u_ptr, u_strides, place)
    delta_at, delta_step = _token(delta_ptr, delta_strides, place)
    B, B_step = _matrix(
        B_ptr, B_strides, place, A_row, mask, CONSTANT_B, COMPLEX
    )
    h = _zeros(NR, NL, DL, DR, COMPLEX)
    total = tl.zeros_like(bias)
    whole = count // GROUP * GROUP
    for k in range(0, whole, GROUP):
        h, some = _advance(
            h, k ^ zero, u_at, delta_at, B, u_step, delta_step, B_step,
            A, bias, d, c, n, mask_d, mask_c, mask_n,
            CONSTANT_B, SOFTPLUS, ZOH, COMPLEX, GROUP,
        )  # fmt: skip
        total += some
    for k in range(whole, count):
        h, some = _advance(
            h, k ^ zero, u_at, delta_at, B, u_step, delta_step, B_step,
            A, bias, d, c, n, mask_d, mask_c, mask_n,
            CONSTANT_B, SOFTPLUS, ZOH, COMPLEX, 1,
        )  # fmt: skip
        total += some
    row = (tl.program_id(1) * directions + direction) * batch + sample
    end_at = ends_ptr + row * dim * STATE * WIDTH + state
    _store(end_at, h, mask, COMPLEX)
    tl.store(sums_ptr + row * dim + c, total, mask=mask_c)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _scan_fwd_kernel(
    u_ptr, delta_ptr,  # (directions, batch, length, dim)
    A_ptr,  # (directions, dim, state)
    B_ptr, C_ptr,  # (directions, batch, length, groups, state) or as A
    D_ptr, bias_ptr,  # (directions, dim) or None
    ends_ptr, sums_ptr,  # of _scan_ends_kernel; None if there is one span
    y_ptr,  # (directions, batch, length, dim)
    last_ptr,  # (directions, batch, dim, state)
    borders_ptr,  # (directions, batch, chunks, dim, state) or None
    u_strides, delta_strides, B_strides, C_strides,
    directions, batch, length, groups, channels, span, reverse, zero,
    STATE: tl.constexpr, WHOLE: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
    NR: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    place = _program(batch, length, groups, channels, span, reverse, DL * DR)
    direction, sample, _, _, first, order, count = place
    offsets, masks, weights, state, A_row = _numbers(
        place, groups, channels, STATE, COMPLEX, NR, NL, DL, DR
    )
    n, _m, c, d = offsets
    mask_n = None if STATE == NR * NL else masks[0]
    mask_c = None if WHOLE else masks[1]
    mask_d = None if WHOLE else masks[2]
    mask = None if WHOLE & (STATE == NR * NL) else masks[3]
    WIDTH: tl.constexpr = 2 if COMPLEX else 1
    dim = groups * channels
    A = _load(A_ptr + A_row, mask, COMPLEX)
    D = _load_optional(D_ptr, weights + d, mask_d)
    bias = _load_optional(bias_ptr, weights + c, mask_c)
    u_at, u_step = _token(u_ptr, u_strides, place)
    delta_at, delta_step = _token(delta_ptr, delta_strides, place)
    B, B_step = _matrix(
        B_ptr, B_strides, place, A_row, mask, CONSTANT_B, COMPLEX
    )
    C, C_step = _matrix(
        C_ptr, C_strides, place, A_row, mask, CONSTANT_C, COMPLEX
    )
    row = direction * batch + sample
    y_at = y_ptr + (row * length + first) * dim
    y_step = (order * dim).to(tl.int32)
    h = _zeros(NR, NL, DL, DR, COMPLEX)
    if ends_ptr is not None:
        stride = directions.to(tl.int64) * batch * dim
        h = _fold(
            h, ends_ptr + row * dim * STATE * WIDTH + state,
            sums_ptr + row * dim + c, stride * STATE * WIDTH, stride,
            tl.program_id(1), A, mask, mask_c, False, COMPLEX,
        )  # fmt: skip
    if borders_ptr is not None:
        border = (
            row * tl.cdiv(length, CHUNK) + tl.program_id(1) * span // CHUNK
        )
        border_at = borders_ptr + border * dim * STATE * WIDTH + state
    whole = count // CHUNK * CHUNK
    for i in range(0, whole, CHUNK):
        if borders_ptr is not None:
            _store(border_at, h, mask, COMPLEX)
            border_at += dim * STATE * WIDTH
        for k in range(0, CHUNK, GROUP):
            h = _scan_group(
                h, (i + k) ^ zero, u_at, delta_at, B, C, y_at,
                u_step, delta_step, B_step, C_step, y_step, A, D, bias,
                d, c, n, mask_d, mask_c, mask_n,
                CONSTANT_B, CONSTANT_C, SOFTPLUS, ZOH, COMPLEX, GROUP,
            )  # fmt: skip
    if borders_ptr is not None:  # noqa: SIM102 - one is compile-time
        if whole < count:
            _store(border_at, h, mask, COMPLEX)
    for i in range(whole, count):
        h = _scan_group(
            h, i ^ zero, u_at, delta_at, B, C, y_at,
            u_step, delta_step, B_step, C_step, y_step, A, D, bias,
            d, c, n, mask_d, mask_c, mask_n,
            CONSTANT_B, CONSTANT_C, SOFTPLUS, ZOH, COMPLEX, 1,
        )  # fmt: skip
    if tl.program_id(1) == tl.num_programs(1) - 1:
        last_at = last_ptr + row * dim * STATE * WIDTH + state
        _store(last_at, h, mask, COMPLEX)
