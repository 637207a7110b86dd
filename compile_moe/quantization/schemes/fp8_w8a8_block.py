"""float8_e4m3fn weights with one scale a block of block_shape = (bn, bk); tokens with one scale a group of bk.

Over a block, whose last row and column of blocks may be cut off:

    scale = max(max|w| / 448, 2^-126),  q = e4m3(clamp(w / scale, -448, 448)),  w = q * scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compile_moe.quantization.decoding_16_bits import registers_of_e4m3
from compile_moe.quantization.parameters import check_block_shape
from compile_moe.quantization.rounding import LARGEST, round_to, symmetric_scale
from compile_moe.quantization.scheme import QuantizedWeights, Scheme, register
from compile_moe.quantization.token_scaling import TokenScaling


@register
@dataclass(frozen=True)
class Fp8Block(Scheme):
    """Weights (E, N, K) float8_e4m3fn, scales (E, ceil(N / bn), ceil(K / bk)) float32."""

    name = "fp8_w8a8_block"
    weight_dtype = torch.float8_e4m3fn
    decode_registers = registers_of_e4m3
    scale_layout = "(E, ceil(N / bn), ceil(K / bk))"

    block_shape: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        check_block_shape(self.name, self.block_shape)

    @property
    def token_scaling(self) -> TokenScaling:
        return TokenScaling(self.weight_dtype, "group", self.block_shape[1])

    @property
    def scale_block(self) -> tuple[int, int | None]:
        return self.block_shape

    def scale_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...]:
        block_n, block_k = self.block_shape
        return num_experts, -(-n // block_n), -(-k // block_k)

    def quantize(self, w: Tensor, zero_points: bool, scale_dtype: torch.dtype) -> QuantizedWeights:
        n, k = w.shape[-2:]
        block_n, block_k = self.block_shape
        padded = F.pad(w, (0, -k % block_k, 0, -n % block_n))
        blocks = padded.unflatten(-1, (-1, block_k)).unflatten(-3, (-1, block_n))
        scale = symmetric_scale(blocks.abs().amax((-3, -1)), LARGEST[self.weight_dtype])
        return QuantizedWeights(round_to(w / self._expand(scale, n, k), self.weight_dtype), scale)

    def dequantize(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return weight.to(dtype) * self._expand(scale, *weight.shape[-2:]).to(dtype)

    def _expand(self, scale: Tensor, n: int, k: int) -> Tensor:
        rows = scale.repeat_interleave(self.block_shape[0], -2)[..., :n, :]
        return rows.repeat_interleave(self.block_shape[1], -1)[..., :k]
