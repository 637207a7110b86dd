"""Triton functions that decode stored numbers to bfloat16 or float16, two at a time: exactly, before zero point and
scale.

Numbers are put where the mantissa's last bits are of a power of two, which is then subtracted with the bias. For CUDA
devices only: the interpreter runs no PTX.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Of nibbles: 128 + n of bfloat16, 1024 + n of float16; less those and the bias, 8.
LESS_8_BF16 = {"magic": "0x43004300", "fma": "fma.rn.bf16x2", "one": "0x3f803f80", "offset": "0xc308c308"}
LESS_8_FP16 = {"magic": "0x64006400", "fma": "fma.rn.f16x2", "one": "0x3c003c00", "offset": "0xe408e408"}

# The first two bytes of a register in the 16-bit halves of p. fma takes no constants.
_START = """{{
    .reg .b32 p, q, r, one, offset;
    mov.b32 one, {one};
    mov.b32 offset, {offset};
    prmt.b32 p, {stored}, 0, 0x4140;"""

_NIBBLES = (
    _START
    + """
    prmt.b32 q, {stored}, 0, 0x4342;
    lop3.b32 $0, p, 0x000f000f, {magic}, 0xea;  // (a & b) | c
    lop3.b32 $1, q, 0x000f000f, {magic}, 0xea;
    shr.b32 p, p, 4;
    shr.b32 q, q, 4;
    lop3.b32 $2, p, 0x000f000f, {magic}, 0xea;
    lop3.b32 $3, q, 0x000f000f, {magic}, 0xea;
    {fma} $0, $0, one, offset;
    {fma} $1, $1, one, offset;
    {fma} $2, $2, one, offset;
    {fma} $3, $3, one, offset;
    }}"""
)
_NIBBLES_BF16 = tl.constexpr(_NIBBLES.format(stored="$4", **LESS_8_BF16))
_NIBBLES_FP16 = tl.constexpr(_NIBBLES.format(stored="$4", **LESS_8_FP16))

# bfloat16 has room for 7 bits: 128 + those, less 128 where the last one is set, and 256 where not.
_BYTES_BF16 = tl.constexpr(
    _START.format(stored="$1", one="0x3f803f80", offset="0xc380c380")
    + """
    lop3.b32 r, p, 0x00800080, offset, 0x6a;  // (a & b) ^ c
    lop3.b32 p, p, 0x007f007f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, p, one, r;
    }"""
)
_BYTES_FP16 = tl.constexpr(
    _START.format(stored="$1", one="0x3c003c00", offset="0xe480e480")
    + """
    or.b32 p, p, 0x64006400;
    fma.rn.f16x2 $0, p, one, offset;
    }"""
)

# Exponent and mantissa of e2m1, and its sign, where bfloat16 has them: two copies of a nibble, 6 bits apart, masked;
# times 2^126, the difference of the biases.
_E2M1_BF16 = tl.constexpr(
    _START.format(stored="$2", one="0x7e807e80", offset="0x80008000")
    + """
    and.b32 q, p, 0x000f000f;
    and.b32 r, p, 0x00f000f0;
    mul.lo.u32 q, q, 0x1040;
    mul.lo.u32 r, r, 0x104;
    and.b32 q, q, 0x81c081c0;
    and.b32 r, r, 0x81c081c0;
    fma.rn.bf16x2 $0, q, one, offset;
    fma.rn.bf16x2 $1, r, one, offset;
    }"""
)

# The same of words: bytes 0 and 2, and 1 and 3, share a register, where they lie anyway.
_NIBBLE_WORDS = """{{
    .reg .b32 p, one, offset;
    mov.b32 one, {one};
    mov.b32 offset, {offset};
    lop3.b32 $0, $4, 0x000f000f, {magic}, 0xea;
    shr.b32 p, $4, 8;
    lop3.b32 $1, p, 0x000f000f, {magic}, 0xea;
    shr.b32 p, $4, 4;
    lop3.b32 $2, p, 0x000f000f, {magic}, 0xea;
    shr.b32 p, $4, 12;
    lop3.b32 $3, p, 0x000f000f, {magic}, 0xea;
    {fma} $0, $0, one, offset;
    {fma} $1, $1, one, offset;
    {fma} $2, $2, one, offset;
    {fma} $3, $3, one, offset;
    }}"""
_NIBBLE_WORDS_BF16 = tl.constexpr(_NIBBLE_WORDS.format(**LESS_8_BF16))
_NIBBLE_WORDS_FP16 = tl.constexpr(_NIBBLE_WORDS.format(**LESS_8_FP16))
_E2M1_WORDS_BF16 = tl.constexpr(
    """{
    .reg .b32 p, one, offset;
    mov.b32 one, 0x7e807e80;
    mov.b32 offset, 0x80008000;
    shr.b32 p, $4, 8;
    and.b32 $0, $4, 0x000f000f;
    and.b32 $1, p, 0x000f000f;
    and.b32 $2, $4, 0x00f000f0;
    and.b32 $3, p, 0x00f000f0;
    mul.lo.u32 $0, $0, 0x1040;
    mul.lo.u32 $1, $1, 0x1040;
    mul.lo.u32 $2, $2, 0x104;
    mul.lo.u32 $3, $3, 0x104;
    and.b32 $0, $0, 0x81c081c0;
    and.b32 $1, $1, 0x81c081c0;
    and.b32 $2, $2, 0x81c081c0;
    and.b32 $3, $3, 0x81c081c0;
    fma.rn.bf16x2 $0, $0, one, offset;
    fma.rn.bf16x2 $1, $1, one, offset;
    fma.rn.bf16x2 $2, $2, one, offset;
    fma.rn.bf16x2 $3, $3, one, offset;
    }"""
)
_BYTE_WORDS_BF16 = tl.constexpr(
    """{
    .reg .b32 p, q, one, offset;
    mov.b32 one, 0x3f803f80;
    mov.b32 offset, 0xc380c380;
    lop3.b32 $0, $2, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 p, $2, 0x00800080, offset, 0x6a;
    shr.b32 q, $2, 8;
    fma.rn.bf16x2 $0, $0, one, p;
    lop3.b32 $1, q, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 q, q, 0x00800080, offset, 0x6a;
    fma.rn.bf16x2 $1, $1, one, q;
    }"""
)
_BYTE_WORDS_FP16 = tl.constexpr(
    """{
    .reg .b32 q, one, offset;
    mov.b32 one, 0x3c003c00;
    mov.b32 offset, 0xe480e480;
    shr.b32 q, $2, 8;
    lop3.b32 $0, $2, 0x00ff00ff, 0x64006400, 0xea;
    lop3.b32 $1, q, 0x00ff00ff, 0x64006400, 0xea;
    fma.rn.f16x2 $0, $0, one, offset;
    fma.rn.f16x2 $1, $1, one, offset;
    }"""
)

# Of signed bytes, with 128 added.
_SIGNED_BYTE_WORDS_FP16 = tl.constexpr(
    """{
    .reg .b32 q, one, offset;
    mov.b32 one, 0x3c003c00;
    mov.b32 offset, 0xe480e480;
    shr.b32 q, $2, 8;
    lop3.b32 $0, $2, 0x00ff00ff, 0x64806480, 0x6a;  // (a & b) ^ c
    lop3.b32 $1, q, 0x00ff00ff, 0x64806480, 0x6a;
    fma.rn.f16x2 $0, $0, one, offset;
    fma.rn.f16x2 $1, $1, one, offset;
    }"""
)
_E4M3_WORDS_FP16 = tl.constexpr(
    """{
    .reg .b32 p;
    .reg .b16 q, r;
    prmt.b32 p, $2, 0, 0x3120;
    mov.b32 {q, r}, p;
    cvt.rn.f16x2.e4m3x2 $0, q;
    cvt.rn.f16x2.e4m3x2 $1, r;
    }"""
)

# Exponents of float32 as bfloat16: 2^-127, a denormal, and NaN for infinity have their last exponent bit one lower.
_E8M0_BF16 = tl.constexpr(
    """{
    .reg .b32 p, q, r;
    prmt.b32 p, $1, 0, 0x4140;
    add.u32 q, p, 0x00ff00ff;
    add.u32 r, p, 0x00010001;
    lop3.b32 q, q, r, 0x01000100, 0x8a;  // (~a | b) & c: 0 or 255
    shr.b32 q, q, 2;
    mad.lo.u32 $0, p, 128, q;
    }"""
)


@triton.jit
def _low_and_high(codes: tl.tensor, BF16: tl.constexpr, FP16: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """Both nibbles of four bytes in a register, by the text for DTYPE."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            BF16, "=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            FP16, "=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )


@triton.jit
def nibbles_less_8(codes: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """The low and the high nibbles."""
    return _low_and_high(codes, _NIBBLES_BF16, _NIBBLES_FP16, DTYPE)


@triton.jit
def bytes_less_128(codes: tl.tensor, DTYPE: tl.constexpr) -> Any:
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            _BYTES_BF16, "=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(_BYTES_FP16, "=r,r", [codes], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def e2m1_nibbles(codes: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """The low and the high nibbles. bfloat16 only, whose exponents are those of the scales."""
    tl.static_assert(tl.bfloat16 == DTYPE)
    return tl.inline_asm_elementwise(
        _E2M1_BF16, "=&r,=&r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
    )


@triton.jit
def nibble_words_less_8(codes: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """The low and the high nibbles, of every four bytes those of 0, 2, 1, 3."""
    return _low_and_high(codes, _NIBBLE_WORDS_BF16, _NIBBLE_WORDS_FP16, DTYPE)


@triton.jit
def byte_words_less_128(codes: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """Of every four bytes those of 0, 2, 1, 3."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            _BYTE_WORDS_BF16, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            _BYTE_WORDS_FP16, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )


@triton.jit
def e2m1_nibble_words(codes: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """The low and the high nibbles, of every four bytes those of 0, 2, 1, 3. bfloat16 only."""
    tl.static_assert(tl.bfloat16 == DTYPE)
    return _low_and_high(codes, _E2M1_WORDS_BF16, _E2M1_WORDS_BF16, DTYPE)


@triton.jit
def e8m0_numbers(codes: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """2^(codes - 127); NaN for 255. bfloat16 only."""
    tl.static_assert(tl.bfloat16 == DTYPE)
    return tl.inline_asm_elementwise(_E8M0_BF16, "=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _registers(words: tl.tensor, BF16: tl.constexpr, FP16: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """Of each pair of equal words a pair of numbers: low nibbles of bytes 0 and 2, of 1 and 3; high ones of these."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            BF16, "=&r,=&r,=&r,=&r,r,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            FP16, "=&r,=&r,=&r,=&r,r,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=2
        )


@triton.jit
def registers_of_nibbles_less_8(words: tl.tensor, DTYPE: tl.constexpr) -> Any:
    return _registers(words, _NIBBLE_WORDS_BF16, _NIBBLE_WORDS_FP16, DTYPE)


@triton.jit
def registers_of_e2m1_nibbles(words: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """bfloat16 only."""
    tl.static_assert(tl.bfloat16 == DTYPE)
    return _registers(words, _E2M1_WORDS_BF16, _E2M1_WORDS_BF16, DTYPE)


@triton.jit
def registers_of_bytes_less_128(words: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """Of bytes 0 and 2, and of 1 and 3."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            _BYTE_WORDS_BF16,
            "=&r,=&r,r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            _BYTE_WORDS_FP16, "=&r,=&r,r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )


@triton.jit
def registers_of_signed_bytes(words: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """float16 only."""
    tl.static_assert(tl.float16 == DTYPE)
    return tl.inline_asm_elementwise(
        _SIGNED_BYTE_WORDS_FP16, "=&r,=&r,r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )


@triton.jit
def registers_of_e4m3(words: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """float16 only, where the GPU has the instruction: from sm_89 on."""
    tl.static_assert(tl.float16 == DTYPE)
    return tl.inline_asm_elementwise(
        _E4M3_WORDS_FP16, "=&r,=&r,r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )
