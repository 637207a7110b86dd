"""Lowering of reduce_batch: a pointwise sum unrolled over topk, as that of weight_and_reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from compile_moe.lowering.inductor_compat import flattened, lower, ops, pointwise, static_int
from compile_moe.ops.reduce_batch import reduce_batch


def _lowering(batch: Any, topk_weights: Any, batch_rows: Any, apply_weights: bool = True) -> Any:
    num_experts, max_num_tokens, k = batch.get_size()
    m, topk = batch_rows.get_size()
    slots_of_token = range(static_int(topk))
    num_rows = num_experts * max_num_tokens
    dtype = batch.get_dtype()
    compute_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    load_row, load_weight = batch_rows.make_loader(), topk_weights.make_loader()
    # In memory, because rows are gathered from it.
    load_out = flattened(batch, [num_rows, k]).make_loader()

    def element(index: Sequence[Any]) -> Any:
        token, column = index
        total = None
        for j in map(sympy.Integer, slots_of_token):
            row = load_row([token, j])
            zero = ops.constant(0, torch.int32)
            is_placed = ops.logical_and(
                ops.ge(row, zero), ops.lt(row, ops.index_expr(sympy.sympify(num_rows), torch.int32))
            )
            here = ops.indirect_indexing(ops.where(is_placed, row, zero), num_rows, check=False)
            term = ops.to_dtype(load_out([here, column]), compute_dtype)
            if apply_weights:
                term = ops.mul(term, ops.to_dtype(load_weight([token, j]), compute_dtype))
            # Selects, so that nothing of a row without a token, not even NaN, gets through.
            term = ops.where(is_placed, term, ops.constant(0.0, compute_dtype))
            total = term if total is None else ops.add(total, term)
        return ops.to_dtype(total, dtype)

    return pointwise(batch, dtype, [m, k], element)


def register() -> None:
    lower(reduce_batch, _lowering)
