"""Zeros in the rows of skipped slots, which no row tile holds."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.launch import Launch

BLOCK_M, BLOCK_N = 16, 256


@triton.jit(do_not_specialize=["num_slots"])
def zero_skipped_kernel(
    out_ptr,  # (S, columns), contiguous
    slots_ptr,
    expert_offsets_ptr,
    num_slots,
    num_experts,
    num_columns,
    SCATTERED: tl.constexpr,  # out is in slot order, not in expert order
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.load(expert_offsets_ptr + num_experts)
    first = tl.minimum(tl.maximum(first, 0), num_slots).to(tl.int64) + tl.program_id(0) * BLOCK_M
    if first < num_slots:
        row = first + tl.arange(0, BLOCK_M)
        mask = row < num_slots
        if SCATTERED:
            row = tl.load(slots_ptr + row, mask=mask, other=-1)
            mask = (row >= 0) & (row < num_slots)
        rows_ptr = out_ptr + row.to(tl.int64)[:, None] * num_columns
        zeros = tl.zeros([BLOCK_M, BLOCK_N], out_ptr.dtype.element_ty)
        for start in range(0, num_columns, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            tl.store(rows_ptr + column[None, :], zeros, mask=mask[:, None] & (column < num_columns)[None, :])


def launch_for(
    out: Tensor, sorted_slots: Tensor, expert_offsets: Tensor, num_experts: int, scattered: bool
) -> Launch:
    num_slots, num_columns = out.shape
    args = (out, sorted_slots, expert_offsets, num_slots, num_experts, num_columns)
    options = {"SCATTERED": scattered, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": 4}
    return Launch(zero_skipped_kernel, (triton.cdiv(num_slots, BLOCK_M),), args, options)
