"""As ``decoding_16_bits``, of words with two neighbouring numbers each: two bytes, or a byte's nibbles."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from compile_moe.quantization.decoding_16_bits import LESS_8_BF16, LESS_8_FP16

# Of two bytes, and of one with two nibbles, whose copy, 12 bits higher, has the high one.
_BYTE_PAIR_BF16 = tl.constexpr(
    """{
    .reg .b32 p, r, one, offset;
    mov.b32 one, 0x3f803f80;
    mov.b32 offset, 0xc380c380;
    prmt.b32 p, $1, 0, 0x4140;
    lop3.b32 r, p, 0x00800080, offset, 0x6a;
    lop3.b32 p, p, 0x007f007f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, p, one, r;
    }"""
)
_BYTE_PAIR_FP16 = tl.constexpr(
    """{
    .reg .b32 p, one, offset;
    mov.b32 one, 0x3c003c00;
    mov.b32 offset, 0xe480e480;
    prmt.b32 p, $1, 0x64646464, 0x4140;
    fma.rn.f16x2 $0, p, one, offset;
    }"""
)
_NIBBLE_PAIR = """{{
    .reg .b32 p, one, offset;
    mov.b32 one, {one};
    mov.b32 offset, {offset};
    mul.lo.u32 p, $1, 0x1001;
    lop3.b32 p, p, 0x000f000f, {magic}, 0xea;
    {fma} $0, p, one, offset;
    }}"""
_NIBBLE_PAIR_BF16 = tl.constexpr(_NIBBLE_PAIR.format(**LESS_8_BF16))
_NIBBLE_PAIR_FP16 = tl.constexpr(_NIBBLE_PAIR.format(**LESS_8_FP16))
_E2M1_PAIR_BF16 = tl.constexpr(
    """{
    .reg .b32 p, one, offset;
    mov.b32 one, 0x7e807e80;
    mov.b32 offset, 0x80008000;
    mul.lo.u32 p, $1, 0x1001;
    and.b32 p, p, 0x000f000f;
    mul.lo.u32 p, p, 0x1040;
    and.b32 p, p, 0x81c081c0;
    fma.rn.bf16x2 $0, p, one, offset;
    }"""
)


@triton.jit
def _pairs(words: tl.tensor, BF16: tl.constexpr, FP16: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """Of each pair of equal words, which hold two neighbouring numbers, these."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(BF16, "=r,r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(FP16, "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def pairs_of_bytes_less_128(words: tl.tensor, DTYPE: tl.constexpr) -> Any:
    return _pairs(words, _BYTE_PAIR_BF16, _BYTE_PAIR_FP16, DTYPE)


@triton.jit
def pairs_of_nibbles_less_8(words: tl.tensor, DTYPE: tl.constexpr) -> Any:
    return _pairs(words, _NIBBLE_PAIR_BF16, _NIBBLE_PAIR_FP16, DTYPE)


@triton.jit
def pairs_of_e2m1_nibbles(words: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """bfloat16 only."""
    tl.static_assert(tl.bfloat16 == DTYPE)
    return _pairs(words, _E2M1_PAIR_BF16, _E2M1_PAIR_BF16, DTYPE)
