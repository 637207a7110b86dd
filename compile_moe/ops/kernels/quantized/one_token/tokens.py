"""Tokens of schemes that quantize them, between the GEMMs.

They become numbers of float16, which holds the quantized ones as they are, and scales, by which sums are multiplied.
The formula is that of ``quantize_tokens``. A warp quantizes the tokens of its two segments, and then spreads them over
the eight columns of its right operand.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.quantized.one_token.layouts import STEP_BYTES, columns_of_segments, products
from compile_moe.ops.kernels.quantized.one_token.loads import load_step
from compile_moe.ops.kernels.token_rounding import bits_of_magnitude

_LOADS_AT_ONCE = gl.constexpr(4)


@gluon.jit
def scale_of(bits, LARGEST: gl.constexpr):
    """max(magnitude / LARGEST, 2^-126) of a magnitude's bits; NaN stays."""
    magnitude = bits.to(gl.float32, bitcast=True)
    divisor = gl.full(magnitude.shape, LARGEST, gl.float32, magnitude.type.layout)
    scale = gl.fdiv(magnitude, divisor, ieee_rounding=True)
    return gl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)


@gluon.jit
def scales_of_rows(ptrs, valid, depth, PER: gl.constexpr, LARGEST: gl.constexpr):
    """(segments,): scales of whole rows at pointers (segments,), or of all of them together."""
    layout: gl.constexpr = valid.type.layout.parent
    bits = gl.zeros([valid.shape[0], STEP_BYTES], gl.int32, layout)
    left = gl.full([valid.shape[0]], 0, gl.int32, valid.type.layout) + depth
    for column in range(0, depth, STEP_BYTES * _LOADS_AT_ONCE):
        for i in gl.static_range(_LOADS_AT_ONCE):
            x = load_step(ptrs, column + i * STEP_BYTES, valid, left, STEP_BYTES)
            bits = gl.maximum(bits, bits_of_magnitude(x))
    bits = gl.max(bits, 1)
    if PER == "tensor":
        bits = gl.max(bits, 0) + bits * 0
    return scale_of(bits, LARGEST)


@gluon.jit
def quantized(x, scale, LARGEST: gl.constexpr):
    """Tokens (segments, columns), quantized with scales (segments,), as float16."""
    one = gl.full(scale.shape, 1.0, gl.float32, scale.type.layout)
    reciprocal = gl.expand_dims(gl.fdiv(one, scale, ieee_rounding=True), 1)
    scale = gl.expand_dims(scale, 1)
    x = x.to(gl.float32)
    q = x * reciprocal
    # Corrected by what is left: division, correctly rounded but for denormals.
    q = gl.fma(gl.fma(-q, scale, x), reciprocal, q)
    q = gl.where(q > LARGEST, LARGEST, gl.where(q < -LARGEST, -LARGEST, q))
    if LARGEST == 127.0:
        # To the nearest integer, halves to even: the sum has no bits for more.
        q = (q + 12582912.0) - 12582912.0
    else:
        q = q.to(gl.float8e4nv)
    return q.to(gl.float16)


@gluon.jit
def spread(x):
    """Tokens of segments (2 * WARPS, columns) as those of the right operand (8 * WARPS, columns), four of each."""
    WARPS: gl.constexpr = x.shape[0] // 2
    COLUMNS: gl.constexpr = x.shape[1]
    layout: gl.constexpr = columns_of_segments(WARPS)
    x = gl.convert_layout(gl.reshape(x, [WARPS, 2, COLUMNS]), gl.SliceLayout(1, layout))
    x, _ = gl.broadcast(gl.expand_dims(x, 1), gl.zeros([WARPS, 4, 2, COLUMNS], x.dtype, layout))
    return gl.reshape(x, [8 * WARPS, COLUMNS])


@gluon.jit
def spread_scales(scale):
    """Scales of segments (2 * WARPS,) as those of the columns (WARPS, 1, 8) of the products."""
    WARPS: gl.constexpr = scale.shape[0] // 2
    scale = gl.reshape(scale, [WARPS, 2])
    for _ in gl.static_range(2):
        scale = gl.permute(gl.join(scale, scale), (0, 2, 1))
        scale = gl.reshape(scale, [WARPS, scale.shape[1] * scale.shape[2]])
    return gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, products(WARPS))), 1)
