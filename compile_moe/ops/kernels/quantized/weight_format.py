"""What the quantized GEMMs know of a scheme."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class WeightFormat(NamedTuple):
    """A scheme's layout and the Triton functions that dequantize it.

    decode: stored numbers (uint8, a byte or a nibble each) to float32, before zero point and scale; None multiplies
        weights as they are stored, by tokens of their dtype, but at one token, which decodes both to float16.
    decode_16_bits: stored bytes to float16 or bfloat16, two at a time; None where there is none.
    decode_words: the same of four bytes at a time, of which it returns those of bytes 0, 2, 1, 3. decode_registers: of
        words, each given twice: numbers of bytes 0 and 2, and of 1 and 3. decode_pairs: of words that hold two
        numbers, each given twice: these.
    powers_of_two: what scales are.
    decode_scale: stored scales to float32. decode_scale_16_bits: to float16 or bfloat16; None for those stored so.
    packed: weights a stored element holds, along K. packed_zeros: rows whose zero points share an element.
    rows, group: rows and columns that share a scale; group 0 is a whole row.
    """

    decode: Any
    decode_16_bits: Any
    decode_words: Any
    decode_registers: Any
    decode_pairs: Any
    powers_of_two: bool
    decode_scale: Any
    decode_scale_16_bits: Any
    packed: int
    packed_zeros: int
    rows: int
    group: int

    @property
    def scales_sums(self) -> bool:
        """Whether scales multiply sums of products: tokens have some, too, and both are multiplied as stored."""
        return self.decode is None


@triton.jit
def decode(codes):
    """Placeholder for a scheme's ``decode``."""
    return codes.to(tl.float32)


@triton.jit
def decode_16_bits(codes, DTYPE: tl.constexpr):
    """Placeholder for a scheme's ``decode_16_bits``."""
    return codes.to(DTYPE)


@triton.jit
def decode_words(codes, DTYPE: tl.constexpr):
    """Placeholder for a scheme's ``decode_words``."""
    return codes.to(DTYPE), codes.to(DTYPE)


@triton.jit
def decode_registers(words, DTYPE: tl.constexpr):
    """Placeholder for a scheme's ``decode_registers``."""
    return words.to(DTYPE), words.to(DTYPE)


@triton.jit
def decode_pairs(words, DTYPE: tl.constexpr):
    """Placeholder for a scheme's ``decode_pairs``."""
    return words.to(DTYPE)


@triton.jit
def decode_scale(scales):
    """Placeholder for a scheme's ``decode_scale``."""
    return scales.to(tl.float32)


@triton.jit
def decode_scale_16_bits(scales, DTYPE: tl.constexpr):
    """Placeholder for a scheme's ``decode_scale_16_bits``."""
    return scales.to(DTYPE)
