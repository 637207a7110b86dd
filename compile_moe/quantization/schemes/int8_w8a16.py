"""8-bit weights, stored with a bias of 128, with one scale a row, or one scale (and zero point) a group along K.

Formulas: :mod:`compile_moe.quantization.integer_groups`, with 8 bits; a row is a group where group_size is None.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from compile_moe.quantization.decoding import unsigned_to_float32
from compile_moe.quantization.decoding_16_bits import (
    byte_words_less_128,
    bytes_less_128,
    registers_of_bytes_less_128,
)
from compile_moe.quantization.decoding_pairs import pairs_of_bytes_less_128
from compile_moe.quantization.integer_groups import dequantize_groups, quantize_groups
from compile_moe.quantization.parameters import check_size
from compile_moe.quantization.scheme import QuantizedWeights, Scheme, register

_BIAS = tl.constexpr(128)


@triton.jit
def decode(codes: tl.tensor) -> tl.tensor:
    return unsigned_to_float32(codes, _BIAS)


@register
@dataclass(frozen=True)
class Int8Weights(Scheme):
    """Weights (E, N, K) uint8; scales (E, N), or (E, N, K / group_size) with zero points of that shape, or none."""

    name = "int8_w8a16"
    weight_dtype = torch.uint8
    scale_layout = "(E, N), or (E, N, K / group_size)"
    scale_dtype = None
    decode = decode
    decode_16_bits = bytes_less_128
    decode_words = byte_words_less_128
    decode_registers = registers_of_bytes_less_128
    decode_pairs = pairs_of_bytes_less_128

    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None:
            check_size(self.name, "group_size", self.group_size)

    @property
    def scale_block(self) -> tuple[int, int | None]:
        return 1, self.group_size

    @property
    def column_multiple(self) -> int:
        return self.group_size or 1

    def scale_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...]:
        return (num_experts, n) if self.group_size is None else (num_experts, n, k // self.group_size)

    def zero_point_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...] | None:
        return None if self.group_size is None else self.scale_shape(num_experts, n, k)

    def quantize(self, w: Tensor, zero_points: bool, scale_dtype: torch.dtype) -> QuantizedWeights:
        group_size = self.group_size or w.size(-1)
        q, scale, zero_point = quantize_groups(w, group_size, 8, zero_points, scale_dtype)
        return QuantizedWeights(q, scale.squeeze(-1) if self.group_size is None else scale, zero_point)

    def dequantize(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if self.group_size is None:
            scale = scale.unsqueeze(-1)
        return dequantize_groups(weight, scale, zero_point, 8, dtype)
