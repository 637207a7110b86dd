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
def quantized(x, scale, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """round(clamp(x / scale)) in ``dtype``; ``scale`` has the shape of ``x``. NaN stays, or is 0 in int8."""
    y = tl.div_rn(x.to(tl.float32), scale)
    y = tl.where(y < -LARGEST, -LARGEST, tl.where(y > LARGEST, LARGEST, y))
    if dtype == tl.int8:
        y = libdevice.nearbyint(tl.where(y == y, y, 0.0))
    return y.to(dtype)


def row_strides(t: Tensor) -> tuple[int, int]:
    """The stride of a dimension of size 1 means nothing, but would select another specialization."""
    return (t.stride(0) if t.size(0) > 1 else t.size(1)), t.stride(1)
