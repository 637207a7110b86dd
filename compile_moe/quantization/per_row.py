"""What schemes with one scale a row of the weights, and one a token, share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compile_moe.quantization.rounding import LARGEST, round_to, symmetric_scale
from compile_moe.quantization.scheme import QuantizedWeights, Scheme
from compile_moe.quantization.token_scaling import TokenScaling


@dataclass(frozen=True)
class ScalePerRow(Scheme):
    """Weights (E, N, K) of the scheme's dtype, scales (E, N, 1) float32."""

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
