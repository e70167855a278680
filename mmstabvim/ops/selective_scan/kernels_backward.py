"""Triton kernels of the scan's backward pass; see ``kernels.py``."""

# mypy: ignore-errors

import triton
import triton.language as tl

from mmstabvim.ops.selective_scan.kernels import (
    UNSPECIALIZED,
    _advance,
    _at,
    _drive,
    _entry,
    _fold,
    _load,
    _load_optional,
    _matrix,
    _move,
    _numbers,
    _program,
    _read,
    _step,
    _store,
    _token,
    _zeros,
)
from mmstabvim.ops.selective_scan.kernels_math import (
    _add,
    _conj,
    _decay,
    _dot_states,
    _mul,
    _phi1,
    _scale,
    _sum_channels,
)


@triton.jit
def _collect(
    total, at, x, mask, CONSTANT: tl.constexpr, COMPLEX: tl.constexpr
):  # fmt: skip
    """Add to the gradient of a constant matrix, or store one token's."""
    if CONSTANT:
        return _add(total, x, COMPLEX)
    else:
        _store(at, _sum_channels(x, COMPLEX), mask, COMPLEX)
        return total


@triton.jit
def _recompute(
    i, zero, borders_at, border_step,
    u_at, delta_at, B, u_step, delta_step, B_step, A_at, bias,
    d, c, m, mask, mask_d, mask_c, mask_n,
    CONSTANT_B: tl.constexpr, SOFTPLUS: tl.constexpr, ZOH: tl.constexpr,
    COMPLEX: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """State before token i: from its chunk's border, GROUP tokens a time."""
    border_at = _at(borders_at, i // CHUNK, border_step)
    h = _load(border_at, mask, COMPLEX)
    A = _load(A_at, mask, COMPLEX)
    for k in range(i // CHUNK * CHUNK, i, GROUP):
        h, _some = _advance(
            h, k ^ zero, u_at, delta_at, B, u_step, delta_step, B_step,
            A, bias, c, c, m, mask_c, mask_c, mask_n,
            CONSTANT_B, SOFTPLUS, ZOH, COMPLEX, GROUP,
        )  # fmt: skip
    return h


@triton.jit
def _back_group(
    carry, dA, dB, dC, dD, dbias, h, i,
    u_at, delta_at, B, C, dy_at, du_at, ddelta_at, dB_at, dC_at,
    u_step, delta_step, B_step, C_step, dy_step, du_step, dB_step,
    A_at, D, bias, d, c, n, m, mask, mask_d, mask_c, mask_n,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr,
    COMPLEX: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Walk GROUP tokens from the state h, then back over them."""
    u_c, delta_c = _at(u_at, i, u_step) + c, _at(delta_at, i, delta_step) + c
    dy_d, dC_m = _at(dy_at, i, dy_step) + d, _at(dC_at, i, dB_step) + m
    B_m = _entry(B, i, B_step, m, CONSTANT_B)
    tokens = ()
    for _j in tl.static_range(GROUP):
        B_j = _read(B_m, mask_n, CONSTANT_B, COMPLEX)
        u = _load(u_c, mask_c, False)
        delta = _load(delta_c, mask_c, False)
        dy = _load(dy_d, mask_d, False)
        tokens += ((u, delta, dy, B_j),)
        B_m = _move(B_m, B_step, CONSTANT_B)
        u_c, delta_c, dy_d = u_c + u_step, delta_c + delta_step, dy_d + dy_step
    A = _load(A_at, mask, COMPLEX)
    steps, states = (), ()
    for j in tl.static_range(GROUP):
        u, delta, dy, B_j = tokens[j]
        step, slope = _step(delta, bias, SOFTPLUS)
        decay = _decay(step, A, COMPLEX)
        drive = _drive(step, u, A, B_j, decay, ZOH, COMPLEX)
        steps += ((step, slope, u),)
        states += (h,)
        h = _add(_mul(decay, h, COMPLEX), drive, COMPLEX)
        dread = 2.0 * dy if COMPLEX else dy  # with the conjugate modes
        dC_j = _scale(_conj(h, COMPLEX), dread, COMPLEX)
        dC = _collect(dC, dC_m, dC_j, mask_n, CONSTANT_C, COMPLEX)
        dC_m += dB_step
    i += GROUP
    u_d, dB_m = _at(u_at, i, u_step) + d, _at(dB_at, i, dB_step) + m
    dy_c, dy_d = _at(dy_at, i, dy_step) + c, _at(dy_at, i, dy_step) + d
    du_c, ddelta_c = _at(du_at, i, du_step) + c, _at(ddelta_at, i, du_step) + c
    B_m = _entry(B, i, B_step, m, CONSTANT_B)
    C_m = _entry(C, i, C_step, m, CONSTANT_C)
    # or the decays would wait in registers that are not there
    A = _load(A_at, mask, COMPLEX, AGAIN=True)
    for j in tl.static_range(GROUP - 1, -1, -1):
        u_d, dB_m = u_d - u_step, dB_m - dB_step
        dy_c, dy_d = dy_c - dy_step, dy_d - dy_step
        du_c, ddelta_c = du_c - du_step, ddelta_c - du_step
        B_m = _move(B_m, -B_step, CONSTANT_B)
        C_m = _move(C_m, -C_step, CONSTANT_C)
        B_j = _read(B_m, mask_n, CONSTANT_B, COMPLEX)
        C_j = _read(C_m, mask_n, CONSTANT_C, COMPLEX)
        u = _load(u_d, mask_d, False)
        dy = _load(dy_d, mask_d, False)
        step, slope, u_1 = steps[j]
        decay = _decay(step, A, COMPLEX)
        dread = 2.0 * dy if COMPLEX else dy
        # the gradient of the state after the token
        dh = _scale(_conj(C_j, COMPLEX), dread, COMPLEX)
        dh = _add(carry, dh, COMPLEX)
        carry = _mul(dh, _conj(decay, COMPLEX), COMPLEX)
        # of step A; a product: the next state less its input would cancel
        drate = _mul(carry, _conj(states[j], COMPLEX), COMPLEX)
        if ZOH:
            gain, bend = _phi1(_scale(A, step, COMPLEX), decay, COMPLEX)
            bend = _mul(bend, _scale(B_j, step * u, COMPLEX), COMPLEX)
            bend = _mul(dh, _conj(bend, COMPLEX), COMPLEX)
            drate = _add(drate, bend, COMPLEX)
            dh = _mul(dh, _conj(gain, COMPLEX), COMPLEX)
        dB_j = _scale(dh, step * u, COMPLEX)
        dB = _collect(dB, dB_m, dB_j, mask_n, CONSTANT_B, COMPLEX)
        dx = _dot_states(dh, _conj(B_j, COMPLEX), COMPLEX)
        dA = _add(dA, _scale(drate, step, COMPLEX), COMPLEX)
        # from here on each lane has a channel of its own
        dy_1 = _load(dy_c, mask_c, False)
        tl.store(du_c, dx * step + D * dy_1, mask=mask_c)
        drate = _dot_states(drate, _conj(A, COMPLEX), COMPLEX)
        ddelta = (drate + dx * u_1) * slope
        tl.store(ddelta_c, ddelta, mask=mask_c)
        dD += u_1 * dy_1
        dbias += ddelta
    return carry, dA, dB, dC, dD, dbias


@triton.jit
def _adjoint_group(
    carry, i, delta_at, C, dy_at, delta_step, C_step, dy_step, A, bias,
    d, c, n, mask_d, mask_c, mask_n,
    CONSTANT_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    COMPLEX: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradient of the state before GROUP tokens, and their steps' sum."""
    delta_c = _at(delta_at, i, delta_step) + c
    dy_d = _at(dy_at, i, dy_step) + d
    C_n = _entry(C, i, C_step, n, CONSTANT_C)
    tokens = ()
    for _j in tl.static_range(GROUP):
        delta, dy = _load(delta_c, mask_c, False), _load(dy_d, mask_d, False)
        C_j = _read(C_n, mask_n, CONSTANT_C, COMPLEX)
        tokens += ((delta, dy, C_j),)
        delta_c, dy_d = delta_c + delta_step, dy_d + dy_step
        C_n = _move(C_n, C_step, CONSTANT_C)
    total = tl.zeros_like(bias)
    for j in tl.static_range(GROUP - 1, -1, -1):
        delta, dy, C_j = tokens[j]
        step, _ = _step(delta, bias, SOFTPLUS)
        dread = 2.0 * dy if COMPLEX else dy  # with the conjugate modes
        dh = _scale(_conj(C_j, COMPLEX), dread, COMPLEX)
        decay = _conj(_decay(step, A, COMPLEX), COMPLEX)
        carry = _mul(_add(carry, dh, COMPLEX), decay, COMPLEX)
        total += step
    return carry, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _adjoint_ends_kernel(
    dy_ptr, delta_ptr, A_ptr, C_ptr, bias_ptr,  # as of _scan_bwd_kernel
    ends_ptr,  # (spans, directions, batch, dim, state)
    sums_ptr,  # (spans, directions, batch, dim)
    dy_strides, delta_strides, C_strides,
    directions, batch, length, groups, channels, span, reverse, zero,
    STATE: tl.constexpr, WHOLE: tl.constexpr, CONSTANT_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, GROUP: tl.constexpr,
    NR: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    """Gradient of the state before each span, from zero after it."""
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
    delta_at, delta_step = _token(delta_ptr, delta_strides, place)
    dy_at, dy_step = _token(dy_ptr, dy_strides, place)
    C, C_step = _matrix(
        C_ptr, C_strides, place, A_row, mask, CONSTANT_C, COMPLEX
    )
    carry = _zeros(NR, NL, DL, DR, COMPLEX)
    total = tl.zeros_like(bias)
    for k in range(count % GROUP):
        carry, some = _adjoint_group(
            carry, (count - 1 - k) ^ zero, delta_at, C, dy_at,
            delta_step, C_step, dy_step, A, bias,
            d, c, n, mask_d, mask_c, mask_n,
            CONSTANT_C, SOFTPLUS, COMPLEX, 1,
        )  # fmt: skip
        total += some
    whole = count // GROUP
    for k in range(whole):
        carry, some = _adjoint_group(
            carry, ((whole - 1 - k) * GROUP) ^ zero, delta_at, C, dy_at,
            delta_step, C_step, dy_step, A, bias,
            d, c, n, mask_d, mask_c, mask_n,
            CONSTANT_C, SOFTPLUS, COMPLEX, GROUP,
        )  # fmt: skip
        total += some
    row = (tl.program_id(1) * directions + direction) * batch + sample
    end_at = ends_ptr + row * dim * STATE * WIDTH + state
    _store(end_at, carry, mask, COMPLEX)
    tl.store(sums_ptr + row * dim + c, total, mask=mask_c)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _scan_bwd_kernel(
    dy_ptr,  # (directions, batch, length, dim)
    dlast_ptr,  # (directions, batch, dim, state) or None
    borders_ptr,  # (directions, batch, chunks, dim, state)
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr,  # as forward
    ends_ptr, sums_ptr,  # of _adjoint_ends_kernel; None if one span
    du_ptr, ddelta_ptr,  # (directions, batch, length, dim)
    dA_ptr,  # (spans, directions, batch, dim, state)
    # (blocks, directions, batch, length, groups, state) or as dA
    dB_ptr, dC_ptr,
    dD_ptr, dbias_ptr,  # (spans, directions, batch, dim)
    dy_strides, u_strides, delta_strides, B_strides, C_strides,
    directions, batch, length, groups, channels, span, reverse, zero,
    STATE: tl.constexpr, WHOLE: tl.constexpr,
    CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
    NR: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr, DR: tl.constexpr,
):  # fmt: skip
    place = _program(batch, length, groups, channels, span, reverse, DL * DR)
    direction, sample, group, block, first, order, count = place
    offsets, masks, weights, state, A_row = _numbers(
        place, groups, channels, STATE, COMPLEX, NR, NL, DL, DR
    )
    n, m, c, d = offsets
    mask_n = None if STATE == NR * NL else masks[0]
    mask_c = None if WHOLE else masks[1]
    mask_d = None if WHOLE else masks[2]
    mask = None if WHOLE & (STATE == NR * NL) else masks[3]
    WIDTH: tl.constexpr = 2 if COMPLEX else 1
    dim = groups * channels
    D = _load_optional(D_ptr, weights + c, mask_c)
    bias = _load_optional(bias_ptr, weights + c, mask_c)
    u_at, u_step = _token(u_ptr, u_strides, place)
    delta_at, delta_step = _token(delta_ptr, delta_strides, place)
    dy_at, dy_step = _token(dy_ptr, dy_strides, place)
    B, B_step = _matrix(
        B_ptr, B_strides, place, A_row, mask, CONSTANT_B, COMPLEX
    )
    C, C_step = _matrix(
        C_ptr, C_strides, place, A_row, mask, CONSTANT_C, COMPLEX
    )
    row = direction * batch + sample
    du_at = du_ptr + (row * length + first) * dim
    ddelta_at = ddelta_ptr + (row * length + first) * dim
    du_step = (order * dim).to(tl.int32)
    part = ((block * directions * batch + row) * length + first) * groups
    dB_at = dB_ptr + (part + group) * STATE * WIDTH
    dC_at = dC_ptr + (part + group) * STATE * WIDTH
    dB_step = (order * groups * STATE * WIDTH).to(tl.int32)
    carry = _zeros(NR, NL, DL, DR, COMPLEX)
    dA, dB, dC = carry, carry, carry
    dD, dbias = tl.zeros_like(D), tl.zeros_like(D)
    if dlast_ptr is not None:
        last_at = dlast_ptr + row * dim * STATE * WIDTH + state
        carry = _load(last_at, mask, COMPLEX)
    if ends_ptr is not None:
        spans = tl.num_programs(1)
        stride = directions.to(tl.int64) * batch * dim
        end = (spans - 1) * stride + row * dim
        carry = _fold(
            carry, ends_ptr + end * STATE * WIDTH + state, sums_ptr + end + c,
            -stride * STATE * WIDTH, -stride, spans - 1 - tl.program_id(1),
            _load(A_ptr + A_row, mask, COMPLEX), mask, mask_c, True, COMPLEX,
        )  # fmt: skip
    border = row * tl.cdiv(length, CHUNK) + tl.program_id(1) * span // CHUNK
    borders_at = borders_ptr + border * dim * STATE * WIDTH + state
    for k in range(count % GROUP):
        i = count - 1 - k
        h = _recompute(
            i, zero, borders_at, dim * STATE * WIDTH,
            u_at, delta_at, B, u_step, delta_step, B_step, A_ptr + A_row,
            bias, d, c, m, mask, mask_d, mask_c, mask_n,
            CONSTANT_B, SOFTPLUS, ZOH, COMPLEX, CHUNK, 1,
        )  # fmt: skip
        carry, dA, dB, dC, dD, dbias = _back_group(
            carry, dA, dB, dC, dD, dbias, h, i ^ zero,
            u_at, delta_at, B, C, dy_at, du_at, ddelta_at, dB_at, dC_at,
            u_step, delta_step, B_step, C_step, dy_step, du_step, dB_step,
            A_ptr + A_row, D, bias, d, c, n, m, mask, mask_d, mask_c, mask_n,
            CONSTANT_B, CONSTANT_C, SOFTPLUS, ZOH, COMPLEX, 1,
        )  # fmt: skip
    whole = count // GROUP
    for k in range(whole):
        i = (whole - 1 - k) * GROUP
        h = _recompute(
            i, zero, borders_at, dim * STATE * WIDTH,
            u_at, delta_at, B, u_step, delta_step, B_step, A_ptr + A_row,
            bias, d, c, m, mask, mask_d, mask_c, mask_n,
            CONSTANT_B, SOFTPLUS, ZOH, COMPLEX, CHUNK, GROUP,
        )  # fmt: skip
        carry, dA, dB, dC, dD, dbias = _back_group(
            carry, dA, dB, dC, dD, dbias, h, i ^ zero,
            u_at, delta_at, B, C, dy_at, du_at, ddelta_at, dB_at, dC_at,
            u_step, delta_step, B_step, C_step, dy_step, du_step, dB_step,
            A_ptr + A_row, D, bias, d, c, n, m, mask, mask_d, mask_c, mask_n,
            CONSTANT_B, CONSTANT_C, SOFTPLUS, ZOH, COMPLEX, GROUP,
        )  # fmt: skip
    row = tl.program_id(1) * directions * batch + row
    sum_at = row * dim * STATE * WIDTH + state
    _store(dA_ptr + sum_at, dA, mask, COMPLEX)
    if CONSTANT_B:
        _store(dB_ptr + sum_at, dB, mask, COMPLEX)
    if CONSTANT_C:
        _store(dC_ptr + sum_at, dC, mask, COMPLEX)
    tl.store(dD_ptr + row * dim + c, dD, mask=mask_c)
    tl.store(dbias_ptr + row * dim + c, dbias, mask=mask_c)
