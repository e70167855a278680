# mypy: ignore-errors
"""SiLU inside Triton kernels; only files of kernels import this one."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _silu(x):
    """``x sigmoid(x)``; exp2 is one instruction, exp is five."""
    return x / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def _silu_and_slope(x):
    """SiLU and its derivative, with no difference that cancels."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    share = 1.0 / (1.0 + e)
    rest = e * share
    negative = x < 0.0
    value = tl.where(negative, rest, share)
    return x * value, value * (1.0 + x * tl.where(negative, share, rest))
