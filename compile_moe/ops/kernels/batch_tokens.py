"""Copy each slot's token to its place in a batch: a block of rows for each expert."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.tiles import row_stride

ROWS = 4
MOST_COLUMNS = 1024


@triton.jit(do_not_specialize=["num_slots", "num_row_programs"])
def batch_tokens_kernel(
    batch_ptr,  # (E, max_num_tokens, C), contiguous
    batch_rows_ptr,  # (M, topk), contiguous
    expert_num_tokens_ptr,  # (E,)
    num_dropped_ptr,  # (E,)
    tokens_ptr,  # (M, C)
    sorted_slots_ptr,  # (S,)
    expert_offsets_ptr,  # (E + 1,)
    num_slots,
    num_row_programs,
    topk,
    num_experts,
    max_num_tokens,
    num_columns,  # C
    stride_tm,
    stride_tc,
    E_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (i, j) copies columns j of the sorted slots i; the ones behind the last slots write the counts.

    Whatever sorted_slots and expert_offsets hold, no access is outside of the arguments.
    """
    await_earlier_kernels(EARLY)
    program = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    start = tl.load(expert_offsets_ptr + e, mask=e < num_experts, other=num_slots)
    end = tl.load(expert_offsets_ptr + e + 1, mask=e < num_experts, other=num_slots)
    start = tl.minimum(tl.maximum(start, 0), num_slots)
    end = tl.minimum(tl.maximum(end, start), num_slots)
    if program >= num_row_programs:
        if tl.program_id(1) == 0:
            kept = tl.minimum(end - start, max_num_tokens)
            tl.store(expert_num_tokens_ptr + e, kept, mask=e < num_experts)
            tl.store(num_dropped_ptr + e, end - start - kept, mask=e < num_experts)
        return

    row = program * ROWS + tl.arange(0, ROWS)
    here = (row[:, None] >= start[None, :]) & (row[:, None] < end[None, :])
    is_placed = tl.sum(here.to(tl.int32), 1) == 1
    expert = tl.sum(tl.where(here, e[None, :], 0), 1)
    position = row - tl.sum(tl.where(here, start[None, :], 0), 1)
    is_placed = is_placed & (position < max_num_tokens)
    batch_row = tl.where(is_placed, expert * max_num_tokens + position, -1)
    slot = tl.load(sorted_slots_ptr + row, mask=row < num_slots, other=-1)
    is_slot = (slot >= 0) & (slot < num_slots)
    if tl.program_id(1) == 0:
        tl.store(batch_rows_ptr + slot, batch_row, mask=is_slot)
    is_copied = is_placed & is_slot
    token = tl.where(is_copied, slot, 0) // topk
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = is_copied[:, None] & (column < num_columns)[None, :]
    source = token.to(tl.int64)[:, None] * stride_tm + column.to(tl.int64)[None, :] * stride_tc
    x = tl.load(tokens_ptr + source, mask=mask)
    tl.store(batch_ptr + batch_row.to(tl.int64)[:, None] * num_columns + column[None, :], x, mask=mask)


def launch_for(
    batch: Tensor,
    batch_rows: Tensor,
    expert_num_tokens: Tensor,
    num_dropped: Tensor,
    tokens: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
) -> Launch:
    num_experts, max_num_tokens, num_columns = batch.shape
    num_slots = sorted_slots.size(0)
    num_row_programs = triton.cdiv(num_slots, ROWS)
    block = min(triton.next_power_of_2(max(1, num_columns)), MOST_COLUMNS)
    args = (
        batch,
        batch_rows,
        expert_num_tokens,
        num_dropped,
        tokens,
        sorted_slots,
        expert_offsets,
        num_slots,
        num_row_programs,
        batch_rows.size(1),
        num_experts,
        max_num_tokens,
        num_columns,
        row_stride(tokens),
        tokens.stride(1),
    )
    options = {
        "E_POW2": triton.next_power_of_2(num_experts),
        "ROWS": ROWS,
        "BLOCK": block,
        "num_warps": 4,
        **early_launch(batch.device),
    }
    grid = (num_row_programs + 1, max(1, triton.cdiv(num_columns, block)))
    return Launch(batch_tokens_kernel, grid, args, options)


def batch_tokens(*arguments: Tensor) -> None:
    """Launch into batch (E, max_num_tokens, C), batch_rows (M, topk), expert_num_tokens and num_dropped (E,), all
    contiguous, from tokens (M, C) of the batch's dtype, and their sort.
    """
    launch(_plan, *arguments)


def _plan(*arguments: Any) -> Plan:
    only = launch_for(*arguments)
    key = ("batch_tokens", only.args[9:], *map(pointer_key, only.args[:7]))
    return Plan(key, (only,), lambda: (only,))
