"""The kernels. The first GEMM gives a slot to a program, which finds its expert by one load of the router's ids.

A program of the second has two columns of all of the token's experts, weights and sums them itself, and loads its first
weights while the first GEMM ends: the ids that name them are as old as that one's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compile_moe.ops.kernels.early_launch import await_earlier_kernels
from compile_moe.ops.kernels.epilogue import epilogue
from compile_moe.ops.kernels.sort_kernels import local_expert


@triton.jit
def expert_of(
    topk_ids_ptr, expert_map_ptr, slot, topk, stride_ij, num_global, num_experts, HAS_MAP: tl.constexpr
):
    """Local expert of each slot of the only token; ``num_experts`` where it is skipped, or none."""
    sizes = topk, 0, stride_ij, num_global, num_experts
    return local_expert((topk_ids_ptr, expert_map_ptr), slot, slot < topk, sizes, HAS_MAP)


@triton.jit
def router_weight(ptrs, mask, dtype: tl.constexpr, ROUND: tl.constexpr):
    weight = tl.load(ptrs, mask=mask, other=0.0)
    if ROUND:
        weight = weight.to(dtype)
    return weight.to(tl.float32)


def rows_kernel(
    out_ptr,  # (topk, num_columns), contiguous
    x_ptr,  # (1, depth)
    w_ptr,  # (E, rows, depth)
    bias_ptr,  # (E, rows)
    topk_ids_ptr,  # (1, topk)
    expert_map_ptr,  # (num_global,)
    topk,
    num_global,
    num_experts,
    num_columns,  # of the result: half of the rows of weights where there is a gate
    depth,
    stride_xk,
    stride_ij,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    LAYOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLLED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The token times the weights of a slot's expert."""
    await_earlier_kernels(EARLY)
    slot = tl.program_id(1)
    expert = expert_of(topk_ids_ptr, expert_map_ptr, slot, topk, stride_ij, num_global, num_experts, HAS_MAP)
    if expert == num_experts:
        return
    WIDTH: tl.constexpr = BLOCK_N if LAYOUT == "ungated" else 2 * BLOCK_N
    tile_n = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    if LAYOUT == "concatenated":
        w_row = tile_n * BLOCK_N + lane % BLOCK_N
        mask = w_row < num_columns
        w_row += lane // BLOCK_N * num_columns
    else:
        w_row = tile_n * WIDTH + lane
        mask = w_row < (2 * num_columns if LAYOUT == "interleaved" else num_columns)
    k = tl.arange(0, BLOCK_K)
    w_ptr += expert.to(tl.int64) * stride_we
    # As if each row had an x of its own: what a thread multiplies it loads itself, so that no thread waits.
    x_ptrs = x_ptr + lane[:, None] * 0 + k[None, :] * stride_xk
    w_ptrs = w_ptr + w_row[:, None] * stride_wn + k[None, :] * stride_wk
    acc = tl.zeros((WIDTH, BLOCK_K), tl.float32)
    for first_k in tl.range(0, depth, BLOCK_K, loop_unroll_factor=UNROLLED):
        # Sums with the first pointers: of pointers that a loop carries, Triton 3.6 doesn't see that rows are in one
        # piece.
        step_w = w_ptrs + tl.cast(first_k, tl.int64) * stride_wk
        step_x = x_ptrs + tl.cast(first_k, tl.int64) * stride_xk
        k_mask = first_k + k < depth
        if EVEN_K:
            w = tl.load(step_w) if EVEN_N else tl.load(step_w, mask=mask[:, None], other=0.0)
            x = tl.load(step_x)
        else:
            w = tl.load(step_w, mask=mask[:, None] & k_mask[None, :], other=0.0)
            x = tl.load(step_x, mask=k_mask[None, :], other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        bias_ptr += expert.to(tl.int64) * stride_be
        y += tl.load(bias_ptr + w_row * stride_bn, mask=mask, other=0.0).to(tl.float32)
    if LAYOUT == "concatenated":
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, BLOCK_N)), (1, 0)))
        y = epilogue(gate, up)
    elif LAYOUT == "interleaved":
        gate, up = tl.split(tl.reshape(y, (BLOCK_N, 2)))
        y = epilogue(gate, up)
    else:
        y = epilogue(y, y)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + slot.to(tl.int64) * num_columns + column
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=column < num_columns)


@triton.jit
def down_kernel(
    out_ptr,  # (1, num_columns), contiguous
    x_ptr,  # (topk, I), contiguous
    w_ptr,  # (E, K, I)
    bias_ptr,  # (E, K)
    topk_weights_ptr,  # (1, topk)
    topk_ids_ptr,  # (1, topk)
    expert_map_ptr,  # (num_global,)
    topk,
    num_global,
    num_experts,
    num_columns,  # K
    depth,  # I
    stride_tj,
    stride_ij,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    APPLY_WEIGHTS: tl.constexpr,
    ROUND_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLLED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The weighted sum of a few columns of all experts' results."""
    lane = tl.arange(0, SLOTS * BLOCK_N)
    slot = lane // BLOCK_N
    column = tl.program_id(0) * BLOCK_N + lane % BLOCK_N
    # Ahead of the wait: rows_kernel, which is always what was launched before, waited for all that wrote these.
    expert = expert_of(topk_ids_ptr, expert_map_ptr, slot, topk, stride_ij, num_global, num_experts, HAS_MAP)
    valid = expert < num_experts
    mask = valid & (column < num_columns)
    expert = tl.where(valid, expert, 0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + (expert * stride_we + column * stride_wn)[:, None] + k[None, :] * stride_wk
    w = tl.load(w_ptrs, mask=mask[:, None] & (k < depth)[None, :], other=0.0)
    await_earlier_kernels(EARLY)
    x_ptrs = x_ptr + slot.to(tl.int64)[:, None] * depth + k[None, :]
    x = tl.load(x_ptrs, mask=valid[:, None] & (k < depth)[None, :], other=0.0)
    acc = w.to(tl.float32) * x.to(tl.float32)
    for first_k in tl.range(BLOCK_K, tl.maximum(depth, BLOCK_K), BLOCK_K, loop_unroll_factor=UNROLLED):
        w_mask = mask[:, None]
        x_mask = valid[:, None]
        if not EVEN_K:
            w_mask &= (first_k + k < depth)[None, :]
            x_mask &= (first_k + k < depth)[None, :]
        w = tl.load(w_ptrs + tl.cast(first_k, tl.int64) * stride_wk, mask=w_mask, other=0.0)
        x = tl.load(x_ptrs + first_k, mask=x_mask, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + expert * stride_be + column * stride_bn, mask=mask, other=0.0).to(tl.float32)
    if APPLY_WEIGHTS:
        y *= router_weight(
            topk_weights_ptr + slot * stride_tj, valid, out_ptr.dtype.element_ty, ROUND_WEIGHTS
        )
    y = tl.sum(tl.reshape(tl.where(valid, y, 0.0), (SLOTS, BLOCK_N)), 0)
    out_column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + out_column, y.to(out_ptr.dtype.element_ty), mask=out_column < num_columns)
