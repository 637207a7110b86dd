"""4-bit weights, stored with a bias of 8, two to a byte along K, with one scale (and zero point) a group along K.

Formulas: :mod:`compile_moe.quantization.integer_groups`, with 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from compile_moe.quantization.decoding import unsigned_to_float32
from compile_moe.quantization.decoding_16_bits import (
    nibble_words_less_8,
    nibbles_less_8,
    registers_of_nibbles_less_8,
)
from compile_moe.quantization.decoding_pairs import pairs_of_nibbles_less_8
from compile_moe.quantization.integer_groups import dequantize_groups, quantize_groups
from compile_moe.quantization.nibbles import pack_nibbles, unpack_nibbles
from compile_moe.quantization.parameters import check_size
from compile_moe.quantization.scheme import QuantizedWeights, Scheme, register

_BIAS = tl.constexpr(8)


@triton.jit
def decode(codes: tl.tensor) -> tl.tensor:
    return unsigned_to_float32(codes, _BIAS)


@register
@dataclass(frozen=True)
class Int4Weights(Scheme):
    """Weights (E, N, K / 2) uint8, even k in the low nibble; scales (E, N, K / group_size); zero points
    (E, N / 2, K / group_size) uint8, even n in the low nibble, or none.
    """

    name = "int4_w4a16"
    weight_dtype = torch.uint8
    packed = 2
    packed_zero_points = 2
    scale_layout = "(E, N, K / group_size)"
    scale_dtype = None
    decode = decode
    decode_16_bits = nibbles_less_8
    decode_words = nibble_words_less_8
    decode_registers = registers_of_nibbles_less_8
    decode_pairs = pairs_of_nibbles_less_8

    group_size: int = 128

    def __post_init__(self) -> None:
        check_size(self.name, "group_size", self.group_size, multiple=2)

    @property
    def scale_block(self) -> tuple[int, int | None]:
        return 1, self.group_size

    @property
    def column_multiple(self) -> int:
        return self.group_size

    def scale_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...]:
        return num_experts, n, k // self.group_size

    def zero_point_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...]:
        return num_experts, n // self.packed_zero_points, k // self.group_size

    def quantize(self, w: Tensor, zero_points: bool, scale_dtype: torch.dtype) -> QuantizedWeights:
        q, scale, zero_point = quantize_groups(w, self.group_size, 4, zero_points, scale_dtype)
        if zero_point is not None:
            zero_point = pack_nibbles(zero_point, -2)
        return QuantizedWeights(pack_nibbles(q), scale, zero_point)

    def dequantize(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if zero_point is not None:
            zero_point = unpack_nibbles(zero_point, -2)
        return dequantize_groups(unpack_nibbles(weight), scale, zero_point, 4, dtype)
