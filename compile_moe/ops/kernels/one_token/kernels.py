"""The kernels. The first GEMM gives a slot to a program, which finds its expert by one load of the router's ids.

The second does the same in parts, which a third kernel sums, where a row of weights doesn't lie in one piece: then a
program needs many columns. Where it does, a program has two columns of all of the token's experts, weights and sums
them itself, and loads its first weights while the first GEMM ends: the ids that name them are as old as that one's.
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
    out_ptr,  # (topk * SPLITS, num_columns), contiguous
    x_ptr,  # (1 or topk, depth)
    w_ptr,  # (E, rows, depth)
    bias_ptr,  # (E, rows)
    topk_ids_ptr,  # (1, topk)
    expert_map_ptr,  # (num_global,)
    topk,
    num_global,
    num_experts,
    num_columns,  # of the result: half of the rows of weights where there is a gate
    depth,
    stride_xs,  # of a slot; not of the first GEMM, where all have the same token
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
    TRANSPOSED: tl.constexpr,
    IN_PARTS: tl.constexpr,  # the result is one of the second GEMM, which has other strides and another dtype
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLLED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A slot's row times the weights of its expert, or one of SPLITS parts of the depth of that product."""
    await_earlier_kernels(EARLY)
    slot = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
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
    w_offsets = w_row[:, None] * stride_wn + k[None, :] * stride_wk
    if IN_PARTS:
        x_ptr += slot.to(tl.int64) * stride_xs
    if TRANSPOSED:
        x_ptrs = x_ptr + k * stride_xk
    else:
        # As if each row had an x of its own: what a thread multiplies it loads itself, so that no thread waits.
        x_ptrs = x_ptr + lane[:, None] * 0 + k[None, :] * stride_xk
    w_ptrs = w_ptr + w_offsets
    acc = tl.zeros((WIDTH, BLOCK_K), tl.float32)
    start_k = 0
    end_k = depth
    if SPLITS > 1:
        steps = tl.cdiv(tl.cdiv(depth, BLOCK_K), SPLITS)
        start_k = split * steps * BLOCK_K
        # Not before the start: loops are unrolled as if they had no negative number of steps.
        end_k = tl.maximum(tl.minimum(start_k + steps * BLOCK_K, depth), start_k)
    for first_k in tl.range(start_k, end_k, BLOCK_K, loop_unroll_factor=UNROLLED):
        # Sums with the first pointers: of pointers that a loop carries, Triton 3.6 doesn't see that rows are in one
        # piece. Of columns, the sums are of 64 bits in each thread and take 70 registers more, unless they come last.
        if TRANSPOSED:
            step_w = w_ptr + tl.cast(first_k, tl.int64) * stride_wk + w_offsets
        else:
            step_w = w_ptrs + tl.cast(first_k, tl.int64) * stride_wk
        step_x = x_ptrs + tl.cast(first_k, tl.int64) * stride_xk
        k_mask = first_k + k < depth
        if EVEN_K:
            w = tl.load(step_w) if EVEN_N else tl.load(step_w, mask=mask[:, None], other=0.0)
            x = tl.load(step_x)
        else:
            w = tl.load(step_w, mask=mask[:, None] & k_mask[None, :], other=0.0)
            x = tl.load(step_x, mask=k_mask if TRANSPOSED else k_mask[None, :], other=0.0)
        x = x.to(tl.float32)
        acc += w.to(tl.float32) * (x[None, :] if TRANSPOSED else x)
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        bias_ptr += expert.to(tl.int64) * stride_be
        y += tl.load(bias_ptr + w_row * stride_bn, mask=mask & (split == 0), other=0.0).to(tl.float32)
    if LAYOUT == "concatenated":
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, BLOCK_N)), (1, 0)))
        y = epilogue(gate, up)
    elif LAYOUT == "interleaved":
        gate, up = tl.split(tl.reshape(y, (BLOCK_N, 2)))
        y = epilogue(gate, up)
    else:
        y = epilogue(y, y)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + tl.program_id(1).to(tl.int64) * num_columns + column
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=column < num_columns)


@triton.jit
def sum_kernel(
    out_ptr,  # (1, num_columns), contiguous
    x_ptr,  # (topk * SPLITS, num_columns), contiguous
    topk_weights_ptr,  # (1, topk)
    topk_ids_ptr,  # (1, topk)
    expert_map_ptr,  # (num_global,)
    topk,
    num_global,
    num_experts,
    num_columns,
    stride_tj,
    stride_ij,
    APPLY_WEIGHTS: tl.constexpr,
    ROUND_WEIGHTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The weighted sum of what :func:`rows_kernel` made of each slot and part of the depth."""
    await_earlier_kernels(EARLY)
    part = tl.arange(0, PARTS)
    slot = part // SPLITS
    expert = expert_of(topk_ids_ptr, expert_map_ptr, slot, topk, stride_ij, num_global, num_experts, HAS_MAP)
    valid = expert < num_experts
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < num_columns
    x_ptrs = x_ptr + part.to(tl.int64)[:, None] * num_columns + column[None, :]
    y = tl.load(x_ptrs, mask=valid[:, None] & mask[None, :], other=0.0)
    if APPLY_WEIGHTS:
        y *= router_weight(
            topk_weights_ptr + slot * stride_tj, valid, out_ptr.dtype.element_ty, ROUND_WEIGHTS
        )[:, None]
    tl.store(out_ptr + column, tl.sum(y, 0).to(out_ptr.dtype.element_ty), mask=mask)


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
