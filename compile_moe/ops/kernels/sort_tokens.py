"""Stable counting sort of slots by local expert, without atomics: equal inputs give equal bits.

Few slots: one launch, in which every slot counts the slots that come before it. Many slots: histograms of blocks,
a scan over the blocks of each expert, and a scatter that ranks the slots of a block among themselves.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key

TINY_MAX_SLOTS = 32
SMALL_MAX_SLOTS = 4096
BLOCK = 256
CHUNK = 32


@triton.jit
def local_expert(
    topk_ids_ptr,
    expert_map_ptr,
    slot,
    mask,
    topk,
    stride_im,
    stride_ij,
    num_global,
    num_experts,
    HAS_MAP: tl.constexpr,
):
    """Local expert of each slot (int32); num_experts where it is skipped or masked off."""
    token = slot // topk
    ids = tl.load(
        topk_ids_ptr + token.to(tl.int64) * stride_im + (slot - token * topk) * stride_ij, mask=mask, other=-1
    )
    known = (ids >= 0) & (ids < num_global)
    ids = tl.where(known, ids, 0).to(tl.int32)
    if HAS_MAP:
        local = tl.load(expert_map_ptr + ids, mask=mask & known, other=-1)
        known = known & (local >= 0) & (local < num_experts)
        ids = tl.where(known, local, 0).to(tl.int32)
    return tl.where(known, ids, num_experts)


@triton.jit(do_not_specialize=["num_slots"])
def _sort_small(
    sorted_slots_ptr,  # (S,)
    expert_offsets_ptr,  # (E + 1,)
    topk_ids_ptr,  # (M, topk)
    expert_map_ptr,  # (num_global,)
    num_slots,
    topk,
    stride_im,
    stride_ij,
    num_global,
    num_experts,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_earlier_kernels(EARLY)
    pid = tl.program_id(0)
    slot_programs = tl.cdiv(num_slots, BLOCK)
    lane = tl.arange(0, BLOCK)
    if pid < slot_programs:
        slot = pid * BLOCK + lane
        expert = local_expert(
            topk_ids_ptr,
            expert_map_ptr,
            slot,
            slot < num_slots,
            topk,
            stride_im,
            stride_ij,
            num_global,
            num_experts,
            HAS_MAP,
        )
        # Summed over a chunk's lanes only at the end: what remains of a step is a load and a comparison.
        before_lanes = tl.zeros((BLOCK, CHUNK), dtype=tl.int32)
        for first in range(0, num_slots, CHUNK):
            other_slot = first + tl.arange(0, CHUNK)
            other = local_expert(
                topk_ids_ptr,
                expert_map_ptr,
                other_slot,
                other_slot < num_slots,
                topk,
                stride_im,
                stride_ij,
                num_global,
                num_experts,
                HAS_MAP,
            )
            before = (other[None, :] < expert[:, None]) | (
                (other[None, :] == expert[:, None]) & (other_slot[None, :] < slot[:, None])
            )
            before_lanes += (before & (other_slot < num_slots)[None, :]).to(tl.int32)
        tl.store(sorted_slots_ptr + tl.sum(before_lanes, 1), slot, mask=slot < num_slots)
    else:
        boundary = (pid - slot_programs) * BLOCK + lane
        count_lanes = tl.zeros((BLOCK, CHUNK), dtype=tl.int32)
        for first in range(0, num_slots, CHUNK):
            other_slot = first + tl.arange(0, CHUNK)
            other = local_expert(
                topk_ids_ptr,
                expert_map_ptr,
                other_slot,
                other_slot < num_slots,
                topk,
                stride_im,
                stride_ij,
                num_global,
                num_experts,
                HAS_MAP,
            )
            before = (other[None, :] < boundary[:, None]) & (other_slot < num_slots)[None, :]
            count_lanes += before.to(tl.int32)
        tl.store(expert_offsets_ptr + boundary, tl.sum(count_lanes, 1), mask=boundary <= num_experts)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _block_histograms(
    counts_ptr,  # (E + 1, num_blocks)
    topk_ids_ptr,
    expert_map_ptr,
    num_slots,
    num_blocks,
    topk,
    stride_im,
    stride_ij,
    num_global,
    num_experts,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Slots of each block that go to each expert, by comparison."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = local_expert(
        topk_ids_ptr,
        expert_map_ptr,
        slot,
        slot < num_slots,
        topk,
        stride_im,
        stride_ij,
        num_global,
        num_experts,
        HAS_MAP,
    )
    for first in range(0, num_experts + 1, CHUNK):
        bucket = first + tl.arange(0, CHUNK)
        hit = (bucket[:, None] == expert[None, :]) & (slot < num_slots)[None, :]
        tl.store(
            counts_ptr + bucket.to(tl.int64) * num_blocks + block,
            tl.sum(hit.to(tl.int32), 1),
            mask=bucket <= num_experts,
        )


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_blocks(counts_ptr, num_blocks, CHUNK: tl.constexpr):
    """Exclusive scan over the blocks of one expert, in place, and its total behind all of them."""
    expert = tl.program_id(0)
    row_ptr = counts_ptr + expert.to(tl.int64) * num_blocks
    total = tl.zeros((), dtype=tl.int32)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        count = tl.load(row_ptr + block, mask=block < num_blocks, other=0)
        tl.store(row_ptr + block, total + tl.cumsum(count, 0) - count, mask=block < num_blocks)
        total += tl.sum(count, 0)
    tl.store(counts_ptr + tl.cast(tl.num_programs(0), tl.int64) * num_blocks + expert, total)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _scatter_slots(
    sorted_slots_ptr,
    expert_offsets_ptr,
    counts_ptr,  # (E + 1, num_blocks), then the totals (E + 1,)
    topk_ids_ptr,
    expert_map_ptr,
    num_slots,
    num_blocks,
    topk,
    stride_im,
    stride_ij,
    num_global,
    num_experts,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Destination: start of the expert + its slots in earlier blocks + its earlier slots in this block."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    slot = block * BLOCK + lane
    valid = slot < num_slots
    expert = local_expert(
        topk_ids_ptr,
        expert_map_ptr,
        slot,
        valid,
        topk,
        stride_im,
        stride_ij,
        num_global,
        num_experts,
        HAS_MAP,
    )
    totals_ptr = counts_ptr + tl.cast(num_experts + 1, tl.int64) * num_blocks
    before = tl.zeros((BLOCK, CHUNK), dtype=tl.int32)
    running = tl.zeros((), dtype=tl.int32)
    for first in range(0, num_experts + 1, CHUNK):
        bucket = first + tl.arange(0, CHUNK)
        total = tl.load(totals_ptr + bucket, mask=bucket <= num_experts, other=0)
        before += tl.where(bucket[None, :] < expert[:, None], total[None, :], 0)
        if block == 0:
            start = running + tl.cumsum(total, 0) - total
            tl.store(expert_offsets_ptr + bucket, start, mask=bucket <= num_experts)
        running += tl.sum(total, 0)
    for first in range(0, BLOCK, CHUNK):
        other_slot = block * BLOCK + first + tl.arange(0, CHUNK)
        other = local_expert(
            topk_ids_ptr,
            expert_map_ptr,
            other_slot,
            other_slot < num_slots,
            topk,
            stride_im,
            stride_ij,
            num_global,
            num_experts,
            HAS_MAP,
        )
        earlier = (other[None, :] == expert[:, None]) & (other_slot[None, :] < slot[:, None])
        before += (earlier & (other_slot < num_slots)[None, :]).to(tl.int32)
    blocks_before = tl.load(counts_ptr + expert.to(tl.int64) * num_blocks + block, mask=valid, other=0)
    destination = blocks_before + tl.sum(before, 1)
    tl.store(sorted_slots_ptr + destination, slot, mask=valid)


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
    num_blocks = _num_blocks(num_slots)
    # Where there are few slots, any memory stands for what the other launches would get.
    counts = expert_offsets if counts is None else counts
    constants = {"HAS_MAP": expert_map is not None, "BLOCK": BLOCK, "CHUNK": CHUNK}
    # Very few slots: what takes longest are the sums over lanes, so there are few of them in a program.
    tiny, small = (
        Launch(
            _sort_small,
            (triton.cdiv(num_slots, block) + triton.cdiv(num_experts + 1, block),),
            (sorted_slots, expert_offsets, *ids, num_slots, *sizes),
            {
                **constants,
                "BLOCK": block,
                "CHUNK": chunk,
                "num_warps": 8,
                **early_launch(sorted_slots.device),
            },
        )
        for block, chunk in ((16, 32), (64, 128))
    )
    large = (
        Launch(
            _block_histograms,
            (num_blocks,),
            (counts, *ids, num_slots, num_blocks, *sizes),
            {**constants, "num_warps": 8},
        ),
        Launch(_scan_blocks, (num_experts + 1,), (counts, num_blocks), {"CHUNK": 1024, "num_warps": 4}),
        Launch(
            _scatter_slots,
            (num_blocks,),
            (sorted_slots, expert_offsets, counts, *ids, num_slots, num_blocks, *sizes),
            {**constants, "num_warps": 8},
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


def _num_blocks(num_slots: int) -> int:
    return max(1, triton.cdiv(num_slots, BLOCK))


def scratch(sorted_slots: Tensor, num_experts: int) -> Tensor | None:
    """Memory for the counts of each block and expert, and their totals; None for few slots."""
    num_slots = sorted_slots.size(0)
    if num_slots <= SMALL_MAX_SLOTS:
        return None
    return sorted_slots.new_empty((num_experts + 1) * (_num_blocks(num_slots) + 1))


def _plan(sorted_slots: Tensor, *rest: Any) -> Plan:
    every = launches(sorted_slots, *rest)
    like = every[0][0]
    constants = (like.options["HAS_MAP"], *like.args[5:])
    key = ("sort_tokens", constants, *map(pointer_key, like.args[:4]))
    return Plan(key, every[size_class(sorted_slots.size(0))], lambda: sum(every, ()))
