"""GEMM 2: rows in expert order times w2, each stored at its slot."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.gemm_problem import GemmProblem, gemm_problem
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.precision import Precision, accumulate, dot_precision
from compile_moe.ops.kernels.tiles import (
    WARP_SPECIALIZED_FROM,
    Tile,
    grouped_order,
    locate_tile,
    max_row_tiles,
    row_stride,
)
from compile_moe.ops.kernels.tuned_tiles import plan_of, tile_choice
from compile_moe.ops.kernels.warp_specialized import row_tiles
from compile_moe.ops.kernels.warp_specialized import scatter_gemm as warp_specialized
from compile_moe.ops.kernels.warp_specialized import zero_skipped as zero_skipped_rows


@triton.jit(do_not_specialize=["num_slots", "num_row_tiles"])
def scatter_gemm_kernel(
    out_ptr,  # (S, num_columns), contiguous, in slot order
    x_ptr,  # (S, I), in expert order
    w_ptr,  # (E, K, I)
    bias_ptr,  # (E, K)
    sorted_slots_ptr,  # (S,)
    expert_offsets_ptr,  # (E + 1,)
    num_slots,
    num_row_tiles,
    num_experts,
    num_columns,  # K
    depth,  # I
    stride_xm,
    stride_xk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    ZERO_SKIPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAPPED: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_earlier_kernels(EARLY)
    tile_m, tile_n = grouped_order(tl.program_id(0), num_row_tiles, tl.cdiv(num_columns, BLOCK_N), GROUP_M)
    expert, first_row, end_row = locate_tile(
        expert_offsets_ptr, tile_m, num_slots, num_experts, E_POW2, BLOCK_M, ZERO_SKIPPED
    )
    if expert > num_experts:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    row_mask = row < end_row
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < num_columns
    slot = tl.load(sorted_slots_ptr + row, mask=row_mask, other=0)
    store_mask = row_mask & (slot >= 0) & (slot < num_slots)
    out_ptrs = out_ptr + slot.to(tl.int64)[:, None] * num_columns + column[None, :]
    out_mask = store_mask[:, None] & column_mask[None, :]
    if ZERO_SKIPPED:
        if expert == num_experts:
            tl.store(out_ptrs, tl.zeros((BLOCK_M, BLOCK_N), dtype=out_ptr.dtype.element_ty), mask=out_mask)
            return

    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_xm + k[None, :] * stride_xk
    w_ptr += expert.to(tl.int64) * stride_we
    w_ptrs = w_ptr + column[None, :] * stride_wn + k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, depth, BLOCK_K):
        x_mask = row_mask[:, None]
        if EVEN_K:
            w_mask = column_mask[None, :]
        else:
            k_mask = first_k + k < depth
            x_mask = x_mask & k_mask[None, :]
            w_mask = column_mask[None, :] & k_mask[:, None]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if EVEN_N and EVEN_K:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        if SWAPPED:
            acc = accumulate(tl.trans(w), tl.trans(x), acc, PRECISION)
        else:
            acc = accumulate(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if SWAPPED:
        acc = tl.trans(acc)
    if HAS_BIAS:
        bias_ptr += expert.to(tl.int64) * stride_be
        acc += tl.load(bias_ptr + column * stride_bn, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


def launch_for(
    tile: Tile,
    out: Tensor,
    intermediate: Tensor,
    w2: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    zero_skipped: bool,
    precision: Precision,
) -> Launch:
    """The launch of the kernel with one tile."""
    num_slots, num_columns = out.shape
    num_experts, _, depth = w2.shape
    num_row_tiles = max_row_tiles(num_slots, num_experts + zero_skipped, tile.block_m)
    args = (
        out,
        intermediate,
        w2,
        w2 if bias is None else bias,
        sorted_slots,
        expert_offsets,
        num_slots,
        num_row_tiles,
        num_experts,
        num_columns,
        depth,
        row_stride(intermediate),
        intermediate.stride(1),
        *w2.stride(),
        *((0, 0) if bias is None else bias.stride()),
    )
    options = {
        "HAS_BIAS": bias is not None,
        "ZERO_SKIPPED": zero_skipped,
        "PRECISION": precision,
        "E_POW2": triton.next_power_of_2(num_experts + 1),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "EVEN_N": num_columns % tile.block_n == 0,
        "EVEN_K": depth % tile.block_k == 0,
        "GROUP_M": 8,
        "SWAPPED": tile.swapped,
        "num_stages": tile.num_stages,
        "num_warps": tile.num_warps,
        **early_launch(out.device),
    }
    grid = (num_row_tiles * triton.cdiv(num_columns, tile.block_n),)
    return Launch(scatter_gemm_kernel, grid, args, options)


def scatter_gemm(
    out: Tensor,
    intermediate: Tensor,
    w2: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    zero_skipped: bool,
) -> None:
    """Launch into out (S, K), contiguous."""
    special_from = WARP_SPECIALIZED_FROM if w2.element_size() == 2 else None
    launch(
        _plan,
        out,
        intermediate,
        w2,
        sorted_slots,
        expert_offsets,
        bias,
        zero_skipped,
        dot_precision(out.dtype),
        row_tiles.scratch_if_needed(sorted_slots, w2.size(0), special_from),
    )


def launches_for(tile: Tile, *arguments: Any) -> tuple[Launch, ...]:
    """Arguments: those of :func:`launch_for` behind the tile, and memory for row tiles, or None for some."""
    *arguments, tiles = arguments  # type: ignore[assignment]
    if not tile.warp_specialized:
        return (launch_for(tile, *arguments),)
    out, _, w2, sorted_slots, expert_offsets, _, zero_skipped, _ = arguments
    if tiles is None:
        tiles = row_tiles.scratch(sorted_slots, w2.size(0))
    launches: tuple[Launch, ...] = warp_specialized.launches_for(tile, tiles, *arguments[:-2])
    if zero_skipped:
        skipped = zero_skipped_rows.launch_for(out, sorted_slots, expert_offsets, w2.size(0), True)
        launches = (*launches, skipped)
    return launches


def problem_of(*arguments: Any) -> GemmProblem:
    """Arguments: those of :func:`launches_for` behind the tile."""
    out, intermediate, w2, *_, precision, _ = arguments
    return gemm_problem("scatter_gemm", out, intermediate, w2, "ungated", precision)


def _plan(*arguments: Any) -> Plan:
    """Arguments: those of :func:`launches_for` behind the tile."""
    out, _, w2, _, _, bias, zero_skipped, precision, _ = arguments
    problem = problem_of(*arguments)
    choice = tile_choice(problem, out.size(0), out.device.index)
    # The arguments that code depends on are those of every tile.
    like = launch_for(choice.candidates[0], *arguments[:-1])
    key = (
        "scatter_gemm",
        zero_skipped,
        precision,
        bias is not None,
        tuple(w2.shape),
        problem.has_boxes,
        like.args[11:],
        *map(pointer_key, like.args[:6]),
    )
    return plan_of(key, choice, lambda each: launches_for(each, *arguments))
