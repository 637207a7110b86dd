"""float8_e4m3fn weights with one scale an expert; tokens with one scale, static or dynamic.

scale = max(max|w| / 448, 2^-126),  q = e4m3(clamp(w / scale, -448, 448)),  w = q * scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compile_moe.quantization.decoding_16_bits import registers_of_e4m3
from compile_moe.quantization.rounding import LARGEST, round_to, symmetric_scale
from compile_moe.quantization.scheme import QuantizedWeights, Scheme, register
from compile_moe.quantization.token_scaling import TokenScaling


@register
@dataclass(frozen=True)
class Fp8Tensor(Scheme):
    """Weights (E, N, K) float8_e4m3fn, scales (E,) float32."""

    name = "fp8_w8a8_tensor"
    weight_dtype = torch.float8_e4m3fn
    decode_registers = registers_of_e4m3
    scale_layout = "(E,)"

    @property
    def token_scaling(self) -> TokenScaling:
        return TokenScaling(self.weight_dtype, "tensor")

    def scale_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...]:
        return (num_experts,)

    def quantize(self, w: Tensor, zero_points: bool, scale_dtype: torch.dtype) -> QuantizedWeights:
        scale = symmetric_scale(w.abs().amax((-2, -1)), LARGEST[self.weight_dtype])
        return QuantizedWeights(round_to(w / scale[..., None, None], self.weight_dtype), scale)

    def dequantize(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return weight.to(dtype) * scale[..., None, None].to(dtype)
