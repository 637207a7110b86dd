"""Rows of tokens in the order of their experts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class OrderedRows(NamedTuple):
    """Slot s of tokens (num_tokens, K) reads row s // topk; expert e owns sorted_slots[offsets[e]:offsets[e + 1]].

    is_batch: most slots may be skipped, and are not worth a look.
    """

    sorted_slots: Tensor
    offsets: Tensor
    num_tokens: int
    topk: int
    is_batch: bool = False
