"""The formula of quantized tokens, as the CPU computes it: scales from magnitudes, division and rounding to even.

Magnitudes are compared as bits: those of non-negative floats are in their order, with infinity and NaN on top.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


@triton.jit
def bits_of_magnitude(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits, LARGEST: tl.constexpr):
    """max(magnitude / LARGEST, 2^-126); NaN stays."""
    magnitude = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(magnitude, tl.full(magnitude.shape, LARGEST, tl.float32))
    return tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)


@triton.jit
def _quotient(x, scale):
    """x / scale in float32 for a scale of :func:`scale_of`, correctly rounded where it is not so small that it is
    rounded to zero anyway: the reciprocal's product, corrected twice by what is left.

    Small scales and x grow by a power of two, so that what is left is no denormal. Source of the corrections:
    Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990.
    """
    factor = tl.where(scale < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)  # 2^-60, 2^64
    divisor = scale * factor
    reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    # Of infinity nothing is left: 0, or NaN of x that is infinite.
    negative = tl.where(scale == float("inf"), 0.0, -divisor)
    x = x * factor
    product = x * reciprocal
    y = tl.fma(tl.fma(product, negative, x), reciprocal, product)
    y = tl.fma(tl.fma(y, negative, x), reciprocal, y)
    # Of x beyond the largest that the scale was computed of.
    y = tl.where(tl.abs(product) < float("inf"), y, product)
    # The sum of -0 and what is left of it is +0.
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (y.to(tl.int32, bitcast=True) & 0x7FFFFFFF | sign).to(tl.float32, bitcast=True)


@triton.jit
def quantized(x, scale, dtype: tl.constexpr, LARGEST: tl.constexpr, BY_RECIPROCAL: tl.constexpr):
    """round(clamp(x / scale)) in ``dtype``; NaN stays, or is 0 in int8.

    Args:
        scale: broadcasts to x; of :func:`scale_of` if BY_RECIPROCAL.
    """
    x = x.to(tl.float32)
    if BY_RECIPROCAL:
        y = _quotient(x, scale)
    else:
        y = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    y = tl.where(y < -LARGEST, -LARGEST, tl.where(y > LARGEST, LARGEST, y))
    if dtype == tl.int8:
        y = libdevice.nearbyint(tl.where(y == y, y, 0.0))
    return y.to(dtype)


def row_strides(t: Tensor) -> tuple[int, int]:
    """The stride of a dimension of size 1 means nothing, but would select another specialization."""
    return (t.stride(0) if t.size(0) > 1 else t.size(1)), t.stride(1)
