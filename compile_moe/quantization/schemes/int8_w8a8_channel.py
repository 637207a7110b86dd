"""int8 weights with one scale a row; tokens with one scale each.

scale = max(max|w| / 127, 2^-126),  q = round(clamp(w / scale, -127, 127)),  w = q * scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compile_moe.quantization.rounding import LARGEST, round_to, symmetric_scale
from compile_moe.quantization.scheme import QuantizedWeights, Scheme, register
from compile_moe.quantization.token_scaling import TokenScaling


@register
@dataclass(frozen=True)
class Int8Channel(Scheme):
    """Weights (E, N, K) int8, scales (E, N, 1) float32."""

    name = "int8_w8a8_channel"
    weight_dtype = torch.int8
    scale_layout = "(E, N, 1)"

    @property
    def token_scaling(self) -> TokenScaling:
        return TokenScaling(self.weight_dtype, "token")

    def scale_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...]:
        return num_experts, n, 1

    def quantize(self, w: Tensor, zero_points: bool, scale_dtype: torch.dtype) -> QuantizedWeights:
        scale = symmetric_scale(w.abs().amax(-1, keepdim=True), LARGEST[self.weight_dtype])
        return QuantizedWeights(round_to(w / scale, self.weight_dtype), scale)

    def dequantize(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return weight.to(dtype) * scale.to(dtype)
