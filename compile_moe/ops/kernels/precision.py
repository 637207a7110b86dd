"""Input precision of dot products."""

from __future__ import annotations

from typing import Literal

import torch


def input_precision(dtype: torch.dtype) -> Literal["ieee", "tf32"]:
    """Triton's ``input_precision``: TF32 for float32 only where torch's own CUDA GEMMs may use it."""
    if dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"
