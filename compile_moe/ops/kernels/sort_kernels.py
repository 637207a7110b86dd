"""Kernels of the token sort: see :mod:`compile_moe.ops.kernels.sort_tokens`."""

from __future__ import annotations

import triton
import triton.language as tl

from compile_moe.ops.kernels.early_launch import await_earlier_kernels


@triton.jit
def local_expert(ids, slot, mask, sizes, HAS_MAP: tl.constexpr):
    """Local expert of each slot (int32); num_experts where it is skipped or masked off.

    Args:
        ids: pointers to topk_ids and to expert_map.
        sizes: topk, both strides of topk_ids, the number of global experts, that of local ones.
    """
    topk_ids_ptr, expert_map_ptr = ids
    topk, stride_im, stride_ij, num_global, num_experts = sizes
    token = slot // topk
    offset = token.to(tl.int64) * stride_im + (slot - token * topk) * stride_ij
    expert = tl.load(topk_ids_ptr + offset, mask=mask, other=-1)
    known = (expert >= 0) & (expert < num_global)
    expert = tl.where(known, expert, 0).to(tl.int32)
    if HAS_MAP:
        local = tl.load(expert_map_ptr + expert, mask=mask & known, other=-1)
        known = known & (local >= 0) & (local < num_experts)
        expert = tl.where(known, local, 0).to(tl.int32)
    return tl.where(known, expert, num_experts)


@triton.jit(do_not_specialize=["num_slots"])
def sort_tiny_kernel(
    sorted_slots_ptr,  # (S,), S <= SLOTS
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
    SLOTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Every slot, and every expert, counts the slots before it."""
    await_earlier_kernels(EARLY)
    pid = tl.program_id(0)
    slot_programs = tl.cdiv(num_slots, BLOCK)
    ids = topk_ids_ptr, expert_map_ptr
    sizes = topk, stride_im, stride_ij, num_global, num_experts
    other_slot = tl.arange(0, SLOTS)
    valid = other_slot < num_slots
    other = local_expert(ids, other_slot, valid, sizes, HAS_MAP)
    if pid < slot_programs:
        slot = pid * BLOCK + tl.arange(0, BLOCK)
        expert = local_expert(ids, slot, slot < num_slots, sizes, HAS_MAP)
        before = (other[None, :] < expert[:, None]) | (
            (other[None, :] == expert[:, None]) & (other_slot[None, :] < slot[:, None])
        )
        count = tl.sum((before & valid[None, :]).to(tl.int32), 1)
        tl.store(sorted_slots_ptr + count, slot, mask=slot < num_slots)
    else:
        boundary = (pid - slot_programs) * BLOCK + tl.arange(0, BLOCK)
        before = (other[None, :] < boundary[:, None]) & valid[None, :]
        tl.store(expert_offsets_ptr + boundary, tl.sum(before.to(tl.int32), 1), mask=boundary <= num_experts)


@triton.jit
def _store_offsets(expert_offsets_ptr, total, num_experts, BUCKETS: tl.constexpr):
    bucket = tl.arange(0, BUCKETS)
    tl.store(expert_offsets_ptr + bucket, tl.cumsum(total, 0) - total, mask=bucket < num_experts)
    tl.store(expert_offsets_ptr + num_experts, tl.sum(total, 0))


@triton.jit
def _place(
    sorted_slots_ptr,
    expert,
    total,
    before,
    here,
    block,
    num_slots,
    num_experts,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sort the slots of a block and store them.

    Args:
        expert: of each slot, num_experts where it is skipped.
        total, before, here: slots of each expert, all, those of earlier blocks, and of this one.
    """
    lane = tl.arange(0, BLOCK)
    key = tl.sort(expert * BLOCK + lane)
    slot = block * BLOCK + key % BLOCK
    # Where the first one of each expert goes, minus the slots of the block that go to experts before it.
    elsewhere = total - here
    starts = before + tl.cumsum(elsewhere, 0) - elsewhere
    skipped_start = tl.sum(elsewhere, 0) + block * BLOCK - tl.sum(before, 0)
    expert = key // BLOCK
    start = tl.gather(starts, tl.minimum(expert, BUCKETS - 1), 0)
    start = tl.where(expert == num_experts, skipped_start, start)
    # What there is of the last block comes first in it: skipped slots are last, and in order.
    tl.store(sorted_slots_ptr + start + lane, slot, mask=slot < num_slots)


@triton.jit(do_not_specialize=["num_slots"])
def sort_small_kernel(
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
    BUCKETS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Every program has the histograms of all slots and of those before its own."""
    await_earlier_kernels(EARLY)
    block = tl.program_id(0)
    ids = topk_ids_ptr, expert_map_ptr
    sizes = topk, stride_im, stride_ij, num_global, num_experts
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = local_expert(ids, slot, slot < num_slots, sizes, HAS_MAP)
    total = tl.zeros((BUCKETS,), dtype=tl.int32)
    before = tl.zeros((BUCKETS,), dtype=tl.int32)
    for first in range(0, num_slots, CHUNK):
        other_slot = first + tl.arange(0, CHUNK)
        other = local_expert(ids, other_slot, other_slot < num_slots, sizes, HAS_MAP)
        chosen = other < num_experts
        total += tl.histogram(other, BUCKETS, chosen)
        if first < block * BLOCK:
            before += tl.histogram(other, BUCKETS, chosen & (other_slot < block * BLOCK))
    if block == 0:
        _store_offsets(expert_offsets_ptr, total, num_experts, BUCKETS)
    here = tl.histogram(expert, BUCKETS, expert < num_experts)
    _place(sorted_slots_ptr, expert, total, before, here, block, num_slots, num_experts, BUCKETS, BLOCK)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def block_histograms_kernel(
    counts_ptr,  # (E, num_blocks + 1)
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
    BUCKETS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Slots of each block that go to each expert."""
    await_earlier_kernels(EARLY)
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    sizes = topk, stride_im, stride_ij, num_global, num_experts
    expert = local_expert((topk_ids_ptr, expert_map_ptr), slot, slot < num_slots, sizes, HAS_MAP)
    bucket = tl.arange(0, BUCKETS)
    row_ptr = counts_ptr + bucket.to(tl.int64) * (num_blocks + 1)
    count = tl.histogram(expert, BUCKETS, expert < num_experts)
    tl.store(row_ptr + block, count, mask=bucket < num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_blocks_kernel(counts_ptr, num_blocks, CHUNK: tl.constexpr, EARLY: tl.constexpr):
    """Exclusive scan over the blocks of one expert, in place, and its total behind them."""
    await_earlier_kernels(EARLY)
    row_ptr = counts_ptr + tl.program_id(0).to(tl.int64) * (num_blocks + 1)
    total = tl.zeros((), dtype=tl.int32)
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        count = tl.load(row_ptr + block, mask=block < num_blocks, other=0)
        tl.store(row_ptr + block, total + tl.cumsum(count, 0) - count, mask=block < num_blocks)
        total += tl.sum(count, 0)
    tl.store(row_ptr + num_blocks, total)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def scatter_slots_kernel(
    sorted_slots_ptr,
    expert_offsets_ptr,
    counts_ptr,  # (E, num_blocks + 1), scanned
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
    BUCKETS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Slots of a block go behind those of earlier blocks and of earlier experts; the first block stores the offsets."""
    await_earlier_kernels(EARLY)
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    sizes = topk, stride_im, stride_ij, num_global, num_experts
    expert = local_expert((topk_ids_ptr, expert_map_ptr), slot, slot < num_slots, sizes, HAS_MAP)
    bucket = tl.arange(0, BUCKETS)
    there = bucket < num_experts
    row_ptr = counts_ptr + bucket.to(tl.int64) * (num_blocks + 1)
    before = tl.load(row_ptr + block, mask=there, other=0)
    through = tl.load(row_ptr + block + 1, mask=there, other=0)
    total = tl.load(row_ptr + num_blocks, mask=there, other=0)
    if block == 0:
        _store_offsets(expert_offsets_ptr, total, num_experts, BUCKETS)
    here = through - before
    _place(sorted_slots_ptr, expert, total, before, here, block, num_slots, num_experts, BUCKETS, BLOCK)
