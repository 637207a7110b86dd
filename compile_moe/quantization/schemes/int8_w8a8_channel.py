"""int8 weights with one scale a row; tokens with one scale each.

scale = max(max|w| / 127, 2^-126),  q = round(clamp(w / scale, -127, 127)),  w = q * scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compile_moe.quantization.decoding_16_bits import registers_of_signed_bytes
from compile_moe.quantization.per_row import ScalePerRow
from compile_moe.quantization.scheme import register


@register
@dataclass(frozen=True)
class Int8Channel(ScalePerRow):
    """Weights (E, N, K) int8, scales (E, N, 1) float32."""

    name = "int8_w8a8_channel"
    weight_dtype = torch.int8
    decode_registers = registers_of_signed_bytes
