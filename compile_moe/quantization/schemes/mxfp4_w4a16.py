"""MXFP4 weights (OCP microscaling, as in gpt-oss): e2m1 numbers, two to a byte along K, with an e8m0 exponent for 32.

Over a group of 32, with e2m1 the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 (ties to the even code, beyond 6 to 6) and
their negatives:

    e = clamp(floor(log2(max|w|)) - 2, -127, 127),  scale = e + 127,  q = e2m1(w / 2^e),  w = q * 2^(scale - 127)

A group with an infinity or a NaN has scale 255, which is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from compile_moe.quantization.decoding_16_bits import (
    e2m1_nibble_words,
    e2m1_nibbles,
    e8m0_numbers,
    registers_of_e2m1_nibbles,
)
from compile_moe.quantization.decoding_pairs import pairs_of_e2m1_nibbles
from compile_moe.quantization.nibbles import pack_nibbles, unpack_nibbles
from compile_moe.quantization.scheme import QuantizedWeights, Scheme, register

_GROUP = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NAN = 255


@triton.jit
def decode(codes: tl.tensor) -> tl.tensor:
    codes = codes.to(tl.int32)
    # Exponent and mantissa where float32 has them, with the bias of float32 for that of e2m1.
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def decode_scale(scales: tl.tensor) -> tl.tensor:
    scales = scales.to(tl.int32)
    # 2^-127 is a denormal, and what would be infinity is NaN.
    bits = tl.where(scales == 255, 0x7FC00000, tl.maximum(scales << 23, 1 << 22))
    return bits.to(tl.float32, bitcast=True)


@register
@dataclass(frozen=True)
class Mxfp4(Scheme):
    """Weights (E, N, K / 2) uint8, even k in the low nibble; scales (E, N, K / 32) uint8."""

    name = "mxfp4_w4a16"
    weight_dtype = torch.uint8
    packed = 2
    scale_layout = "(E, N, K / 32)"
    scale_dtype = torch.uint8
    decode = decode
    decode_16_bits = e2m1_nibbles
    decode_words = e2m1_nibble_words
    decode_registers = registers_of_e2m1_nibbles
    decode_pairs = pairs_of_e2m1_nibbles
    powers_of_two = True
    decode_scale = decode_scale
    decode_scale_16_bits = e8m0_numbers

    @property
    def scale_block(self) -> tuple[int, int | None]:
        return 1, _GROUP

    @property
    def column_multiple(self) -> int:
        return _GROUP

    def scale_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...]:
        return num_experts, n, k // _GROUP

    def quantize(self, w: Tensor, zero_points: bool, scale_dtype: torch.dtype) -> QuantizedWeights:
        groups = w.unflatten(-1, (-1, _GROUP))
        magnitude = groups.abs().amax(-1)
        # frexp's mantissa lies in [0.5, 1).
        exponent = (torch.frexp(magnitude).exponent - 3).clamp(-127, 127)
        exponent = torch.where(magnitude == 0, -127, exponent)
        scaled = torch.ldexp(groups.abs(), -exponent.unsqueeze(-1))
        codes = torch.zeros_like(scaled, dtype=torch.uint8)
        for low, high, code in zip(_VALUES, _VALUES[1:], range(1, 8), strict=False):
            middle = (low + high) / 2
            codes += scaled >= middle if code % 2 == 0 else scaled > middle
        codes |= torch.signbit(groups).to(torch.uint8) << 3
        scale = torch.where(torch.isfinite(magnitude), exponent + 127, _NAN).to(torch.uint8)
        return QuantizedWeights(pack_nibbles(codes.flatten(-2)), scale)

    def dequantize(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        table = torch.tensor([*_VALUES, *(-v for v in _VALUES)], dtype=dtype, device=weight.device)
        numbers = table[unpack_nibbles(weight).int()].unflatten(-1, (-1, _GROUP))
        powers = torch.ldexp(torch.ones_like(scale, dtype=dtype), scale.int() - 127)
        powers = torch.where(scale == _NAN, torch.nan, powers)
        return (numbers * powers.unsqueeze(-1)).flatten(-2)
