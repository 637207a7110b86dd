"""Arithmetic on 16-bit floating point, two numbers at a time, each result rounded once. CUDA devices only."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# fma takes no constants.
_MINUS_BF16 = tl.constexpr("{.reg .b32 c; mov.b32 c, 0xbf80bf80; fma.rn.bf16x2 $0, $2, c, $1;}")
_MINUS_FP16 = tl.constexpr("sub.rn.f16x2 $0, $1, $2;")
_TIMES_BF16 = tl.constexpr("{.reg .b32 c; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, $1, $2, c;}")
_TIMES_FP16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")


@triton.jit
def difference(a: tl.tensor, b: tl.tensor) -> Any:
    """a - b of 16-bit floating point, rounded once, of a's shape."""
    ASM: tl.constexpr = _MINUS_BF16 if a.dtype == tl.bfloat16 else _MINUS_FP16
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)


@triton.jit
def times(a: tl.tensor, b: tl.tensor) -> Any:
    """a * b of 16-bit floating point, rounded once, of a's shape."""
    ASM: tl.constexpr = _TIMES_BF16 if a.dtype == tl.bfloat16 else _TIMES_FP16
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)
