"""Triton functions with which schemes dequantize inside the kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_float32(scales: tl.tensor) -> tl.tensor:
    return scales.to(tl.float32)


@triton.jit
def unsigned_to_float32(codes: tl.tensor, BIAS: tl.constexpr) -> tl.tensor:
    """``codes - BIAS`` of small unsigned integers, exactly."""
    # As the last bits of a float32 from 2^23 on: the units that convert integers are few.
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + BIAS)
