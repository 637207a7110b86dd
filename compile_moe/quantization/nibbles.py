"""Two 4-bit numbers in a byte: the even one in the low nibble."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(values: Tensor, dim: int = -1) -> Tensor:
    """Pack uint8 values below 16 in pairs along ``dim``."""
    pairs = values.unflatten(dim, (-1, 2))
    at = dim if dim >= 0 else dim + values.dim()
    return pairs.select(at + 1, 0) | pairs.select(at + 1, 1) << 4


def unpack_nibbles(packed: Tensor, dim: int = -1) -> Tensor:
    """The inverse of :func:`pack_nibbles`."""
    at = dim if dim >= 0 else dim + packed.dim()
    return torch.stack([packed & 15, packed >> 4], at + 1).flatten(at, at + 1)
