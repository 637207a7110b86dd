"""Lowering of weight_and_reduce: a pointwise sum unrolled over topk.

Unrolled rather than a reduction: inductor turns reductions of 8 and more into loops of their own, which can't join the
reduction of an RMSNorm behind them. Unrolled, finalize, residual add and RMSNorm are one kernel for every topk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from compile_moe.lowering.inductor_compat import lower, ops, pointwise, static_int
from compile_moe.ops.weight_and_reduce import weight_and_reduce


def _lowering(
    fused_out: Any,
    topk_weights: Any,
    topk_ids: Any = None,
    expert_map: Any = None,
    num_experts: Any = -1,
    apply_weights: bool = True,
) -> Any:
    m, topk, k = fused_out.get_size()
    slots_of_token = range(static_int(topk))
    dtype = fused_out.get_dtype()
    compute_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    load_out, load_weight = fused_out.make_loader(), topk_weights.make_loader()
    load_id: Any = None if topk_ids is None else topk_ids.make_loader()
    load_map: Any = None if expert_map is None else expert_map.make_loader()
    num_global = num_experts if expert_map is None else expert_map.get_size()[0]

    def in_range(value: Any, bound: Any, value_dtype: torch.dtype) -> Any:
        bound = ops.index_expr(sympy.sympify(bound), value_dtype)
        return ops.logical_and(ops.ge(value, ops.constant(0, value_dtype)), ops.lt(value, bound))

    def is_valid(token: Any, j: Any) -> Any:
        value = load_id([token, j])
        valid = in_range(value, num_global, topk_ids.get_dtype())
        if load_map is None:
            return valid
        known = ops.where(valid, value, ops.constant(0, topk_ids.get_dtype()))
        index = ops.indirect_indexing(known, num_global, check=False)
        local = load_map([index])
        return ops.logical_and(valid, in_range(local, num_experts, expert_map.get_dtype()))

    def element(index: Sequence[Any]) -> Any:
        token, column = index
        total = None
        for j in map(sympy.Integer, slots_of_token):
            term = ops.to_dtype(load_out([token, j, column]), compute_dtype)
            if apply_weights:
                term = ops.mul(term, ops.to_dtype(load_weight([token, j]), compute_dtype))
            if load_id is not None:
                # Selects, so that nothing of an unwritten slot, not even NaN, gets through.
                term = ops.where(is_valid(token, j), term, ops.constant(0.0, compute_dtype))
            total = term if total is None else ops.add(total, term)
        return ops.to_dtype(total, dtype)

    return pointwise(fused_out, dtype, [m, k], element)


def register() -> None:
    lower(weight_and_reduce, _lowering)
