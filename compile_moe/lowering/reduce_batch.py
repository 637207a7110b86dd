"""Lowering of reduce_batch: a pointwise sum unrolled over topk, of rows that are gathered from the batch."""

from __future__ import annotations

from typing import Any

import torch

from compile_moe.lowering.inductor_compat import flattened, lower, ops
from compile_moe.lowering.weighted_sum import in_range, weighted_sum
from compile_moe.ops.reduce_batch import reduce_batch


def _lowering(batch: Any, topk_weights: Any, batch_rows: Any, apply_weights: bool = True) -> Any:
    num_experts, max_num_tokens, k = batch.get_size()
    num_rows = num_experts * max_num_tokens
    load_row = batch_rows.make_loader()
    # In memory, because rows are gathered from it.
    load_out = flattened(batch, [num_rows, k]).make_loader()

    def is_placed(token: Any, j: Any) -> Any:
        return in_range(load_row([token, j]), num_rows, torch.int32)

    def load_term(token: Any, j: Any, column: Any) -> Any:
        row = ops.where(is_placed(token, j), load_row([token, j]), ops.constant(0, torch.int32))
        return load_out([ops.indirect_indexing(row, num_rows, check=False), column])

    sizes = (*batch_rows.get_size(), k)
    return weighted_sum(batch, topk_weights, sizes, load_term, is_placed, apply_weights)


def register() -> None:
    lower(reduce_batch, _lowering)
