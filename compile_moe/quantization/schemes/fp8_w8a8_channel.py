"""float8_e4m3fn weights with one scale a row; tokens with one scale each.

scale = max(max|w| / 448, 2^-126),  q = e4m3(clamp(w / scale, -448, 448)),  w = q * scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compile_moe.quantization.decoding_16_bits import registers_of_e4m3
from compile_moe.quantization.per_row import ScalePerRow
from compile_moe.quantization.scheme import register


@register
@dataclass(frozen=True)
class Fp8Channel(ScalePerRow):
    """Weights (E, N, K) float8_e4m3fn, scales (E, N, 1) float32."""

    name = "fp8_w8a8_channel"
    weight_dtype = torch.float8_e4m3fn
    decode_registers = registers_of_e4m3
