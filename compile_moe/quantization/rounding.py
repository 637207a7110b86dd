"""Scales and rounding that the schemes share.

Everything is computed in float32. Scales never become zero or, in float32 and bfloat16, denormal, which GPUs may flush.
NaN and infinity make their scale NaN or infinite, so that whatever shares it dequantizes to NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest magnitudes that symmetric quantization uses.
LARGEST: dict[torch.dtype, float] = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}

#: Smallest scale in float32 and bfloat16.
LEAST_SCALE = 2.0**-126


def symmetric_scale(magnitude: Tensor, largest: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """``max(magnitude / largest, floor)`` in ``dtype``; floor is 2^-126, or 2^-24 for float16."""
    return (
        (magnitude.float() / largest).clamp(min=2.0**-24 if dtype is torch.float16 else LEAST_SCALE).to(dtype)
    )


def round_to(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values to float8 or int8, halves to even, saturating; NaN becomes 0 in int8."""
    largest = LARGEST[dtype]
    if dtype is torch.int8:
        return round_to_integer(scaled, -largest, largest).to(dtype)
    return scaled.clamp(-largest, largest).to(dtype)


def round_to_integer(scaled: Tensor, low: float, high: float) -> Tensor:
    """Round to integers in [low, high], still in float32; NaN becomes 0."""
    return scaled.round().clamp(low, high).nan_to_num(nan=0.0)
