"""Routing and the token sort in one launch of one program, for few tokens; else the kernels of both, in turn.

One program has all choices in its registers, as a matrix of tokens and experts. A token chooses an expert at most
once, so the place of a slot is the start of its expert plus the earlier tokens in that expert's column.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels import sort_tokens as sort
from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.route_tokens import (
    launch_for,
    route_rows,
    routing_arguments,
    routing_constants,
    routing_key,
)

#: Sizes of the matrix that the single program is compiled for, in tokens, and the most elements it may have: with
#: more, two launches of many programs are faster (measured on an H100, 8 to 512 experts).
TOKEN_BLOCKS = (1, 8, 16, 64)
MAX_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_tokens", "scaling_factor", "epsilon"])
def route_and_sort_kernel(
    topk_weights_ptr,
    topk_ids_ptr,
    logits_ptr,
    bias_ptr,
    num_tokens,
    scaling_factor,
    epsilon,
    stride_lm,
    stride_le,
    stride_be,
    sorted_slots_ptr,  # (S,)
    expert_offsets_ptr,  # (E + 1,)
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    EXCLUDED_KEY: tl.constexpr,
    TOPK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_earlier_kernels(EARLY)
    row = tl.arange(0, ROWS)[:, None]
    expert, order = route_rows(
        topk_weights_ptr,
        topk_ids_ptr,
        logits_ptr,
        bias_ptr,
        row,
        num_tokens,
        scaling_factor,
        epsilon,
        stride_lm,
        stride_le,
        stride_be,
        SCORING,
        HAS_BIAS,
        RENORMALIZE,
        NUM_EXPERTS,
        TOPK,
        NUM_GROUPS,
        TOPK_GROUP,
        GROUPS_PAD,
        SIZE_PAD,
        EXCLUDED_KEY,
        TOPK_PAD,
    )
    chosen = (order >= 0) & (row < num_tokens)
    one = chosen.to(tl.int32)
    total = tl.sum(one, 0)
    # Positions are in the order of the experts.
    start = (tl.cumsum(total, 0) - total)[None, :]
    place = start + tl.cumsum(one, 0) - one
    tl.store(sorted_slots_ptr + place, row * TOPK + order, mask=chosen)
    tl.store(expert_offsets_ptr + expert, start, mask=expert < NUM_EXPERTS)
    tl.store(expert_offsets_ptr + NUM_EXPERTS, num_tokens * TOPK)


def single_launches(
    sorted_slots: Tensor, expert_offsets: Tensor, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> dict[int, Launch]:
    """The launches of one program each, by the most tokens they can do."""
    num_positions = constants["GROUPS_PAD"] * constants["SIZE_PAD"]
    return {
        rows: Launch(
            route_and_sort_kernel,
            (1,),
            (*arguments, sorted_slots, expert_offsets),
            {
                **constants,
                "ROWS": rows,
                "num_warps": min(16, max(1, rows * num_positions // 256)),
                **early_launch(sorted_slots.device),
            },
        )
        for rows in TOKEN_BLOCKS
        if rows * num_positions <= MAX_ELEMENTS
    }


def route_and_sort_tokens(
    topk_weights: Tensor,
    topk_ids: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    router_logits: Tensor,
    *arguments: Any,
) -> None:
    """Launch router and sort into (M, topk) float32 and int64, (S,) and (E + 1,) int32, all contiguous.

    Args: then those of the op.
    """
    counts = sort.scratch(sorted_slots, router_logits.size(1))
    launch(_plan, topk_weights, topk_ids, sorted_slots, expert_offsets, counts, router_logits, *arguments)


def _plan(
    topk_weights: Tensor,
    topk_ids: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    counts: Tensor | None,
    router_logits: Tensor,
    topk: int,
    scoring: str,
    correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    epsilon: float = 1e-20,
    excluded_score: float | None = None,
) -> Plan:
    m, num_experts = router_logits.shape
    constants = routing_constants(
        num_experts,
        topk,
        scoring,
        correction_bias,
        num_expert_group,
        topk_group,
        renormalize,
        excluded_score,
    )
    arguments = routing_arguments(
        topk_weights, topk_ids, router_logits, correction_bias, routed_scaling_factor, epsilon
    )
    single = single_launches(sorted_slots, expert_offsets, arguments, constants)
    fitting = [rows for rows in single if m <= rows]

    def sorts() -> tuple[tuple[Launch, ...], ...]:
        return sort.launches(sorted_slots, expert_offsets, topk_ids, num_experts, None, counts)

    def variants() -> tuple[Launch, ...]:
        return (*single.values(), launch_for(arguments, constants), *sum(sorts(), ()))

    if fitting:
        chosen: tuple[Launch, ...] = (single[min(fitting)],)
    else:
        chosen = (launch_for(arguments, constants), *sorts()[sort.size_class(sorted_slots.size(0))])
    pointers = map(pointer_key, (sorted_slots, expert_offsets))
    key = ("route_and_sort_tokens", *routing_key(arguments, constants), *pointers)
    return Plan(key, chosen, variants)
