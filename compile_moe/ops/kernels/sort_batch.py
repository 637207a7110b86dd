"""Expert order of a batch's rows: those that hold tokens, expert by expert, then all others."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key

MOST_ROWS = 1024


@triton.jit
def sort_batch_kernel(
    sorted_slots_ptr,  # (E * max_num_tokens,)
    expert_offsets_ptr,  # (E + 1,)
    expert_num_tokens_ptr,  # (E,)
    num_experts,
    max_num_tokens,
    stride_e,
    E_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program places a block of an expert's rows; the first of each expert writes where it starts."""
    await_earlier_kernels(EARLY)
    blocks = tl.cdiv(max_num_tokens, BLOCK)
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    e = tl.arange(0, E_POW2)
    # Clamped before they become 32-bit.
    counts = tl.load(expert_num_tokens_ptr + e * stride_e, mask=e < num_experts, other=0)
    counts = tl.minimum(tl.maximum(counts, 0), max_num_tokens).to(tl.int32)
    start = tl.sum(tl.where(e < expert, counts, 0), 0)
    count = tl.sum(tl.where(e == expert, counts, 0), 0)
    total = tl.sum(counts, 0)
    i = block * BLOCK + tl.arange(0, BLOCK)
    slot = expert * max_num_tokens + i
    # Behind all tokens: the rows without one of this expert, and before them those of the experts before it.
    place = tl.where(i < count, start + i, total + slot - start - count)
    tl.store(sorted_slots_ptr + place, slot, mask=i < max_num_tokens)
    if block == 0:
        tl.store(expert_offsets_ptr + expert, start)
        tl.store(expert_offsets_ptr + num_experts, total, mask=expert == 0)


def launch_for(
    sorted_slots: Tensor, expert_offsets: Tensor, expert_num_tokens: Tensor, max_num_tokens: int
) -> Launch:
    num_experts = expert_num_tokens.size(0)
    block = min(triton.next_power_of_2(max_num_tokens), MOST_ROWS)
    stride_e = expert_num_tokens.stride(0) if num_experts > 1 else 1
    args = (sorted_slots, expert_offsets, expert_num_tokens, num_experts, max_num_tokens, stride_e)
    options = {
        "E_POW2": triton.next_power_of_2(num_experts),
        "BLOCK": block,
        "num_warps": 4,
        **early_launch(sorted_slots.device),
    }
    return Launch(sort_batch_kernel, (num_experts * triton.cdiv(max_num_tokens, block),), args, options)


def sort_batch(
    sorted_slots: Tensor, expert_offsets: Tensor, expert_num_tokens: Tensor, max_num_tokens: int
) -> None:
    """Launch into sorted_slots (E * max_num_tokens,) and expert_offsets (E + 1,), both int32 and contiguous."""
    launch(_plan, sorted_slots, expert_offsets, expert_num_tokens, max_num_tokens)


def _plan(*arguments: Any) -> Plan:
    only = launch_for(*arguments)
    key = ("sort_batch", only.args[3:], *map(pointer_key, only.args[:3]))
    return Plan(key, (only,), lambda: (only,))
