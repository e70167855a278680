"""Arithmetic of the Triton kernels, on tiles of real or complex numbers.

With COMPLEX a value is a pair of tiles, real and imaginary part, without it
one tile. The axes of a tile are those of ``kernels.py``.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
    """(NR, NL, 1, 1): sum over the block, first within a lane."""
    if COMPLEX:
        return _sum_channels(x[0], False), _sum_channels(x[1], False)
    else:
        x = tl.sum(x, axis=3, keep_dims=True)
        return tl.sum(x, axis=2, keep_dims=True)


@triton.jit
def _dot_states(x, y, COMPLEX: tl.constexpr):
    """(1, 1, DL, DR): real part of the sum of x y over the states."""
    product = x[0] * y[0] - x[1] * y[1] if COMPLEX else x * y
    product = tl.sum(product, axis=0, keep_dims=True)
    return tl.sum(product, axis=1, keep_dims=True)


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
    """``log(1 + exp(x))`` and its slope, each to a few roundings.

    With e = exp(-|x|), log(1 + e) = e P(e), P a Chebyshev fit to 3e-8: the
    hardware's logarithm has an absolute error, and small steps are near its
    zero. A product of inverse roots costs a third of a quotient.
    """
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = -0.02958851 + e * 0.00525346
    p = 0.07836167 + e * p
    p = -0.1367477 + e * p
    p = 0.1911143 + e * p
    p = -0.2484437 + e * p
    p = 0.3331927 + e * p
    p = -0.49999502 + e * p
    p = 1.0 + e * p
    root = tl.rsqrt(1.0 + e)
    slope = tl.where(x < 0.0, e, 1.0) * (root * root)
    return tl.maximum(x, 0.0) + e * p, slope
