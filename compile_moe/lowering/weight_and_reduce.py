"""Lowering of weight_and_reduce: a pointwise sum unrolled over topk, for what follows to fuse with.

Where nothing can, on a GPU, the op's own kernel: inductor's loads a token's weights and ids for each column, where it
isn't part of a reduction.
"""

from __future__ import annotations

from typing import Any

from compile_moe.lowering.inductor_compat import call, lower, ops
from compile_moe.lowering.stands_alone import stands_alone
from compile_moe.lowering.weighted_sum import in_range, weighted_sum
from compile_moe.ops.weight_and_reduce import weight_and_reduce


def _lowering(
    fused_out: Any,
    topk_weights: Any,
    topk_ids: Any = None,
    expert_map: Any = None,
    num_experts: Any = -1,
    apply_weights: bool = True,
) -> Any:
    if fused_out.get_device().type == "cuda" and stands_alone():
        arguments = fused_out, topk_weights, topk_ids, expert_map, num_experts, apply_weights
        return call(weight_and_reduce, *arguments)
    load_out = fused_out.make_loader()
    load_id: Any = None if topk_ids is None else topk_ids.make_loader()
    load_map: Any = None if expert_map is None else expert_map.make_loader()
    num_global = num_experts if expert_map is None else expert_map.get_size()[0]

    def load_term(token: Any, j: Any, column: Any) -> Any:
        return load_out([token, j, column])

    def is_valid(token: Any, j: Any) -> Any:
        value = load_id([token, j])
        valid = in_range(value, num_global, topk_ids.get_dtype())
        if load_map is None:
            return valid
        known = ops.where(valid, value, ops.constant(0, topk_ids.get_dtype()))
        index = ops.indirect_indexing(known, num_global, check=False)
        local = load_map([index])
        return ops.logical_and(valid, in_range(local, num_experts, expert_map.get_dtype()))

    sizes = tuple(fused_out.get_size())
    return weighted_sum(
        fused_out,
        topk_weights,
        sizes,
        load_term,
        None if load_id is None else is_valid,
        apply_weights,
        # Those of experts on other ranks.
        many_invalid=expert_map is not None,
    )


def register() -> None:
    lower(weight_and_reduce, _lowering)
