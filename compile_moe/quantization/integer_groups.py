"""Unsigned integers in groups along K: the arithmetic of the weight-only integer schemes.

With b bits and B = 2^(b-1), over a group of weights w, and s rounded to the scales' dtype before it is used:

    symmetric:         s = max(max|w| / (B - 1), floor),  q = clamp(round(w / s), 1 - B, B - 1) + B
    with zero points:  lo = min(w, 0), hi = max(w, 0),  s = max((hi - lo) / (2B - 1), floor),
                       z = clamp(round(-lo / s), 0, 2B - 1),  q = clamp(round(w / s) + z, 0, 2B - 1)

    w = (q - B) * s,  or with zero points  w = (q - z) * s
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.quantization.rounding import round_to_integer, symmetric_scale


def quantize_groups(
    w: Tensor, group_size: int, bits: int, zero_points: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unsigned integers (..., N, K), scales (..., N, K / group_size) and zero points of that shape, or None."""
    groups = w.unflatten(-1, (-1, group_size))
    bias = 2 ** (bits - 1)
    zero_point = None
    if zero_points:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = symmetric_scale(high - low, 2 * bias - 1, scale_dtype)
        zero_point = round_to_integer(-low / scale.float(), 0, 2 * bias - 1)
        scaled = groups / scale.float().unsqueeze(-1)
        q = (scaled.round() + zero_point.unsqueeze(-1)).clamp(0, 2 * bias - 1).nan_to_num(nan=0.0)
        zero_point = zero_point.to(torch.uint8)
    else:
        scale = symmetric_scale(groups.abs().amax(-1), bias - 1, scale_dtype)
        q = round_to_integer(groups / scale.float().unsqueeze(-1), 1 - bias, bias - 1) + bias
    return q.to(torch.uint8).flatten(-2), scale, zero_point


def dequantize_groups(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """(..., N, K) from integers (..., N, K) and scales (..., N, groups)."""
    groups = q.unflatten(-1, (scale.size(-1), -1)).to(dtype)
    origin = 2 ** (bits - 1) if zero_point is None else zero_point.unsqueeze(-1).to(dtype)
    return ((groups - origin) * scale.unsqueeze(-1).to(dtype)).flatten(-2)
