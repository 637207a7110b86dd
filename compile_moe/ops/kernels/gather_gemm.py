"""GEMM 1: rows gathered through sorted slots, one or two accumulators, activation in the epilogue."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.epilogue import epilogue, with_epilogue
from compile_moe.ops.kernels.gemm_problem import GemmProblem, gemm_problem
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.precision import Precision, accumulate, dot_precision
from compile_moe.ops.kernels.tiles import (
    WARP_SPECIALIZED_FROM,
    Tile,
    early_slots,
    grouped_order,
    locate_tile,
    max_row_tiles,
    row_stride,
    slots_of_rows,
)
from compile_moe.ops.kernels.tuned_tiles import plan_of, tile_choice
from compile_moe.ops.kernels.warp_specialized import gather_gemm as warp_specialized
from compile_moe.ops.kernels.warp_specialized import row_tiles
from compile_moe.ops.kernels.warp_specialized import zero_skipped as zero_skipped_rows

DO_NOT_SPECIALIZE = ("num_slots", "num_row_tiles")


def gather_gemm_kernel(
    out_ptr,  # (S, num_columns), contiguous
    x_ptr,  # (M, K)
    w_ptr,  # (E, N, K)
    bias_ptr,  # (E, N)
    sorted_slots_ptr,  # (S,)
    expert_offsets_ptr,  # (E + 1,)
    num_slots,
    num_row_tiles,
    topk,
    num_experts,
    num_columns,  # I, or N without a gate
    depth,  # K
    stride_xm,
    stride_xk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    stride_bn,
    LAYOUT: tl.constexpr,
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
    # Rows of w1 lie as the result's columns do: gate and up alternate, or are two blocks of their own, which two
    # products read, or one where the operands are swapped.
    GATED: tl.constexpr = LAYOUT != "ungated"
    INTERLEAVED: tl.constexpr = LAYOUT == "interleaved"
    TWO_PRODUCTS: tl.constexpr = LAYOUT == "concatenated" and not SWAPPED
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED and not TWO_PRODUCTS else BLOCK_N
    tile_m, tile_n = grouped_order(tl.program_id(0), num_row_tiles, tl.cdiv(num_columns, BLOCK_N), GROUP_M)
    tile_row = tl.arange(0, BLOCK_M)
    early = early_slots(sorted_slots_ptr, tile_m + tile_row, num_slots, num_experts, BLOCK_M)
    expert, first_row, end_row = locate_tile(
        expert_offsets_ptr, tile_m, num_slots, num_experts, E_POW2, BLOCK_M, ZERO_SKIPPED
    )
    if expert > num_experts:
        return
    row = first_row + tile_row
    row_mask = row < end_row
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < num_columns
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * num_columns + column[None, :]
    out_mask = row_mask[:, None] & column_mask[None, :]
    if ZERO_SKIPPED:
        if expert == num_experts:
            tl.store(out_ptrs, tl.zeros((BLOCK_M, BLOCK_N), dtype=out_ptr.dtype.element_ty), mask=out_mask)
            return

    slot = slots_of_rows(early, sorted_slots_ptr, row, end_row, num_slots, num_experts, BLOCK_M)
    row_mask = row_mask & (slot >= 0) & (slot < num_slots)
    token = tl.where(row_mask, slot, 0) // topk
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride_xm + k[None, :] * stride_xk
    lane = tl.arange(0, WIDTH)
    if WIDTH == BLOCK_N or INTERLEAVED:
        gate_column = tile_n * WIDTH + lane
        gate_mask = gate_column < (2 * num_columns if INTERLEAVED else num_columns)
    else:
        gate_column = tile_n * BLOCK_N + lane % BLOCK_N
        gate_mask = gate_column < num_columns
        gate_column += lane // BLOCK_N * num_columns
    up_column = gate_column + num_columns
    w_ptr += expert.to(tl.int64) * stride_we
    gate_ptrs = w_ptr + gate_column[None, :] * stride_wn + k[:, None] * stride_wk
    up_ptrs = w_ptr + up_column[None, :] * stride_wn + k[:, None] * stride_wk
    gate = tl.zeros((WIDTH, BLOCK_M) if SWAPPED else (BLOCK_M, WIDTH), dtype=tl.float32)
    up = gate
    for first_k in range(0, depth, BLOCK_K):
        x_mask = row_mask[:, None]
        if EVEN_K:
            w_mask = gate_mask[None, :]
        else:
            k_mask = first_k + k < depth
            x_mask = x_mask & k_mask[None, :]
            w_mask = gate_mask[None, :] & k_mask[:, None]
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if EVEN_N and EVEN_K:
            w_gate = tl.load(gate_ptrs)
        else:
            w_gate = tl.load(gate_ptrs, mask=w_mask, other=0.0)
        if SWAPPED:
            gate = accumulate(tl.trans(w_gate), tl.trans(x), gate, PRECISION)
        else:
            gate = accumulate(x, w_gate, gate, PRECISION)
        if TWO_PRODUCTS:
            if EVEN_N and EVEN_K:
                w_up = tl.load(up_ptrs)
            else:
                w_up = tl.load(up_ptrs, mask=w_mask, other=0.0)
            up = accumulate(x, w_up, up, PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        gate_ptrs += BLOCK_K * stride_wk
        up_ptrs += BLOCK_K * stride_wk

    if HAS_BIAS:
        bias_ptr += expert.to(tl.int64) * stride_be
        gate_bias = tl.load(bias_ptr + gate_column * stride_bn, mask=gate_mask, other=0.0).to(tl.float32)
        gate += gate_bias[:, None] if SWAPPED else gate_bias[None, :]
        if TWO_PRODUCTS:
            up += tl.load(bias_ptr + up_column * stride_bn, mask=gate_mask, other=0.0).to(tl.float32)[None, :]
    if SWAPPED:
        if GATED:
            if INTERLEAVED:
                pairs = tl.permute(tl.reshape(gate, (BLOCK_N, 2, BLOCK_M)), (2, 0, 1))
            else:
                pairs = tl.permute(tl.reshape(gate, (2, BLOCK_N, BLOCK_M)), (2, 1, 0))
            gate, up = tl.split(pairs)
        else:
            gate = tl.trans(gate)
    elif INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_M, BLOCK_N, 2)))
    if LAYOUT == "ungated":
        y = epilogue(gate, gate)
    else:
        y = epilogue(gate, up)
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=out_mask)


def launch_for(
    tile: Tile,
    out: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    bias: Tensor | None,
    epilogue_body: str,
    layout: str,
    zero_skipped: bool,
    precision: Precision,
) -> Launch:
    """The launch of the kernel with one tile."""
    num_slots, num_columns = out.shape
    num_experts, _, depth = w1.shape
    num_row_tiles = max_row_tiles(num_slots, num_experts + zero_skipped, tile.block_m)
    args = (
        out,
        hidden_states,
        w1,
        w1 if bias is None else bias,
        sorted_slots,
        expert_offsets,
        num_slots,
        num_row_tiles,
        topk,
        num_experts,
        num_columns,
        depth,
        row_stride(hidden_states),
        hidden_states.stride(1),
        *w1.stride(),
        *((0, 0) if bias is None else bias.stride()),
    )
    options = {
        "LAYOUT": layout,
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
    kernel = with_epilogue(gather_gemm_kernel, epilogue_body, DO_NOT_SPECIALIZE)
    return Launch(kernel, (num_row_tiles * triton.cdiv(num_columns, tile.block_n),), args, options)


def gather_gemm(
    out: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    bias: Tensor | None,
    epilogue_body: str,
    layout: str,
    zero_skipped: bool,
) -> None:
    """Launch into out (S, I), or (S, N) for layout "ungated"; ``epilogue_body`` as ``with_epilogue`` takes it."""
    special_from = WARP_SPECIALIZED_FROM if w1.element_size() == 2 else None
    launch(
        _plan,
        out,
        hidden_states,
        w1,
        sorted_slots,
        expert_offsets,
        topk,
        bias,
        epilogue_body,
        layout,
        zero_skipped,
        dot_precision(out.dtype),
        row_tiles.scratch_if_needed(sorted_slots, w1.size(0), special_from),
    )


def launches_for(tile: Tile, *arguments: Any) -> tuple[Launch, ...]:
    """Arguments: those of :func:`launch_for` behind the tile, and memory for row tiles, or None for some."""
    *arguments, tiles = arguments  # type: ignore[assignment]
    if not tile.warp_specialized:
        return (launch_for(tile, *arguments),)
    out, _, w1, sorted_slots, expert_offsets, *_, zero_skipped, _ = arguments
    if tiles is None:
        tiles = row_tiles.scratch(sorted_slots, w1.size(0))
    launches: tuple[Launch, ...] = warp_specialized.launches_for(tile, tiles, *arguments[:-2])
    if zero_skipped:
        skipped = zero_skipped_rows.launch_for(out, sorted_slots, expert_offsets, w1.size(0), False)
        launches = (*launches, skipped)
    return launches


def problem_of(*arguments: Any) -> GemmProblem:
    """Arguments: those of :func:`launches_for` behind the tile."""
    out, hidden_states, w1, *_, layout, _, precision, _ = arguments
    return gemm_problem("gather_gemm", out, hidden_states, w1, layout, precision)


def _plan(*arguments: Any) -> Plan:
    """Arguments: those of :func:`launches_for` behind the tile."""
    out, _, w1, _, _, topk, bias, epilogue_body, layout, zero_skipped, precision, _ = arguments
    problem = problem_of(*arguments)
    choice = tile_choice(problem, out.size(0), out.device.index)
    # The arguments that code depends on are those of every tile.
    like = launch_for(choice.candidates[0], *arguments[:-1])
    key = (
        "gather_gemm",
        epilogue_body,
        layout,
        zero_skipped,
        precision,
        bias is not None,
        topk,
        tuple(w1.shape),
        problem.has_boxes,
        like.args[12:],
        *map(pointer_key, like.args[:6]),
    )
    return plan_of(key, choice, lambda each: launches_for(each, *arguments))
