"""How tokens are quantized: to which dtype, and which elements share a scale.

Its canonical text, such as ``int8 per token`` or ``float8_e4m3fn per group of 128``, is the ``str`` argument of
``quantize_tokens``. Formula, in float32, over the elements that share a scale:

    scale = max(max|a| / largest, 2^-126),  quantized = round(clamp(a / scale, -largest, largest))

where largest is 448 for float8_e4m3fn and 127 for int8, halves are rounded to even, and a scale that the caller gives
(static) replaces the first line. Elements that share a scale with an infinity or a NaN dequantize to NaN.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compile_moe.quantization.rounding import LARGEST, round_to, symmetric_scale

_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class TokenScaling:
    """Tokens (M, K) in ``dtype`` with float32 scales: (1,) or (M, 1) per tensor, (M, 1) per token,
    (M, ceil(K / group_size)) per group.
    """

    dtype: torch.dtype
    per: Literal["tensor", "token", "group"]
    group_size: int = 0

    @property
    def text(self) -> str:
        per = f"group of {self.group_size}" if self.per == "group" else self.per
        return f"{str(self.dtype).removeprefix('torch.')} per {per}"

    def scale_shape(self, m: int, k: int) -> tuple[int, ...]:
        """Shape of the scales that are computed for (m, k)."""
        if self.per == "tensor":
            return (1,)
        return (m, 1) if self.per == "token" else (m, -(-k // self.group_size))

    def quantize(self, a: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Quantized tokens and their scales (a given one as it is)."""
        a = a.float()
        if scale is None:
            scale = symmetric_scale(self._largest(a), LARGEST[self.dtype])
        return round_to(a / self.expand(scale, a.size(1)), self.dtype), scale

    def scale_of_all(self, maxima: Tensor) -> Tensor:
        """The one scale (1,) of tokens with these largest magnitudes (any number,)."""
        largest = maxima.amax().reshape(1) if maxima.numel() else maxima.new_zeros(1)
        return symmetric_scale(largest, LARGEST[self.dtype])

    def expand(self, scale: Tensor, k: int) -> Tensor:
        """Scales in a shape that broadcasts to (m, k)."""
        return scale.repeat_interleave(self.group_size, -1)[:, :k] if self.per == "group" else scale

    def _largest(self, a: Tensor) -> Tensor:
        m, k = a.shape
        if self.per == "tensor":
            return a.abs().amax().reshape(1) if a.numel() else a.new_zeros(1)
        if self.per == "token":
            return a.abs().amax(1, keepdim=True)
        groups = F.pad(a, (0, -k % self.group_size)).view(m, -(-k // self.group_size), self.group_size)
        return groups.abs().amax(-1)


@functools.lru_cache(1000)
def parse_scaling(text: str) -> TokenScaling:
    """The scaling of a canonical text."""
    match = re.fullmatch(r"(\w+) per (tensor|token|group of ([1-9]\d*))", text)
    if match is None or match[1] not in _DTYPES:
        raise ValueError(
            f"scaling must read 'DTYPE per tensor', 'DTYPE per token' or 'DTYPE per group of N', where DTYPE is one "
            f"of {', '.join(_DTYPES)}, got {text!r}"
        )
    if match[3]:
        return TokenScaling(_DTYPES[match[1]], "group", int(match[3]))
    return TokenScaling(_DTYPES[match[1]], "tensor" if match[2] == "tensor" else "token")
