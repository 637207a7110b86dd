"""Stable counting sort of slots by local expert, without atomics in memory: equal inputs give equal bits.

Very few slots: one launch, in which every slot counts the slots that come before it. Few: one launch, in which every
program counts each expert's slots, all and those before its own block, and sorts its block. Many: histograms of blocks,
a scan over the blocks of each expert, and the same sort of each block.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from compile_moe.ops.kernels.early_launch import early_launch
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.sort_kernels import (
    block_histograms_kernel,
    scan_blocks_kernel,
    scatter_slots_kernel,
    sort_small_kernel,
    sort_tiny_kernel,
)

TINY_MAX_SLOTS = 32
SMALL_MAX_SLOTS = 1024
TINY_BLOCK = 16
SMALL_BLOCK = 128
BLOCK = 256


def launches(
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    expert_map: Tensor | None,
    counts: Tensor | None,
) -> tuple[tuple[Launch, ...], ...]:
    """The launches for very few, few and many slots; the last need ``counts``, from :func:`scratch`."""
    m, topk = topk_ids.shape
    num_slots = m * topk
    num_global = expert_map.size(0) if expert_map is not None else num_experts
    # The stride of a dimension of size 1 means nothing, but would select another specialization.
    stride_im = topk_ids.stride(0) if m > 1 else topk
    ids = (topk_ids, topk_ids if expert_map is None else expert_map)
    sizes = (topk, stride_im, topk_ids.stride(1), num_global, num_experts)
    num_blocks = _num_blocks(num_slots, BLOCK)
    # Where there are few slots, any memory stands for what the other launches would get.
    counts = expert_offsets if counts is None else counts
    early = early_launch(sorted_slots.device)
    constants = {"HAS_MAP": expert_map is not None, **early}
    # A histogram has at least as many buckets as a warp has threads.
    buckets = triton.next_power_of_2(max(num_experts, 32))
    sorting = {**constants, "BUCKETS": buckets, "num_warps": 4}
    few = (sorted_slots, expert_offsets, *ids, num_slots, *sizes)
    tiny_blocks = triton.cdiv(num_slots, TINY_BLOCK) + triton.cdiv(num_experts + 1, TINY_BLOCK)
    tiny = Launch(
        sort_tiny_kernel,
        (tiny_blocks,),
        few,
        {**constants, "BLOCK": TINY_BLOCK, "SLOTS": TINY_MAX_SLOTS, "num_warps": 8},
    )
    small = Launch(
        sort_small_kernel,
        (_num_blocks(num_slots, SMALL_BLOCK),),
        few,
        {**sorting, "BLOCK": SMALL_BLOCK, "CHUNK": 512 if buckets < 2048 else 256},
    )
    large = (
        Launch(
            block_histograms_kernel,
            (num_blocks,),
            (counts, *ids, num_slots, num_blocks, *sizes),
            {**sorting, "BLOCK": BLOCK, "num_warps": 8},
        ),
        Launch(
            scan_blocks_kernel,
            (num_experts,),
            (counts, num_blocks),
            {**early, "CHUNK": 1024, "num_warps": 4},
        ),
        Launch(
            scatter_slots_kernel,
            (num_blocks,),
            (sorted_slots, expert_offsets, counts, *ids, num_slots, num_blocks, *sizes),
            {**sorting, "BLOCK": BLOCK},
        ),
    )
    return (tiny,), (small,), large


def size_class(num_slots: int) -> int:
    """The index into :func:`launches` for so many slots."""
    if num_slots > SMALL_MAX_SLOTS:
        return 2
    return int(num_slots > TINY_MAX_SLOTS)


def sort_tokens(
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    expert_map: Tensor | None,
) -> None:
    """Launch the sort into sorted_slots (S,) and expert_offsets (E + 1,), both int32 and contiguous."""
    expert_map = None if expert_map is None else expert_map.contiguous()
    counts = scratch(sorted_slots, num_experts)
    launch(_plan, sorted_slots, expert_offsets, topk_ids, num_experts, expert_map, counts)


def _num_blocks(num_slots: int, block: int) -> int:
    """At least one, which writes the offsets where there is no slot."""
    return max(1, triton.cdiv(num_slots, block))


def scratch(sorted_slots: Tensor, num_experts: int) -> Tensor | None:
    """Memory for the counts of each block and expert, and their totals; None for few slots."""
    num_slots = sorted_slots.size(0)
    if num_slots <= SMALL_MAX_SLOTS:
        return None
    return sorted_slots.new_empty(num_experts * (_num_blocks(num_slots, BLOCK) + 1))


def _plan(sorted_slots: Tensor, *rest: Any) -> Plan:
    every = launches(sorted_slots, *rest)
    like = every[0][0]
    constants = (like.options["HAS_MAP"], *like.args[5:])
    key = ("sort_tokens", constants, *map(pointer_key, like.args[:4]))
    return Plan(key, every[size_class(sorted_slots.size(0))], lambda: sum(every, ()))
