"""GEMM 1 on quantized weights: rows gathered through sorted slots, activation in the epilogue.

The weights are the left operand, which tensor cores take from registers, where they are dequantized.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.epilogue import epilogue
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.precision import Precision, dot_precision
from compile_moe.ops.kernels.quantized import operands
from compile_moe.ops.kernels.quantized.few_rows import launches as few_rows
from compile_moe.ops.kernels.quantized.few_rows.gather_gemm import few_rows_gather_gemm_kernel
from compile_moe.ops.kernels.quantized.multiply import multiply, with_format
from compile_moe.ops.kernels.quantized.tiles import block_rows, special_from, tile_choice
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat
from compile_moe.ops.kernels.tiles import (
    Tile,
    early_slots,
    grouped_order,
    locate_tile,
    max_row_tiles,
    slots_of_rows,
)
from compile_moe.ops.kernels.tuned_tiles import plan_of
from compile_moe.ops.kernels.warp_specialized import decoding_launches, eight_bit_gather_gemm, row_tiles
from compile_moe.ops.kernels.warp_specialized import zero_skipped as zero_skipped_rows

DO_NOT_SPECIALIZE = ("num_slots", "num_row_tiles")
_NUM_POINTERS, _NUM_BEFORE_SIZES = 9, 11


def quantized_gather_gemm_kernel(
    out_ptr,  # (S, num_columns), contiguous
    x_ptr,  # (M, K)
    x_scale_ptr,  # (M or 1, groups or 1)
    w_ptr,  # (E, N, K / packed)
    scale_ptr,
    zero_ptr,
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
    stride_xsm,
    stride_xsk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_se,
    stride_sn,
    stride_sk,
    stride_ze,
    stride_zn,
    stride_zk,
    stride_be,
    stride_bn,
    LAYOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ZERO_SKIPPED: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    IN_16_BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PACKED: tl.constexpr,
    PACKED_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_earlier_kernels(EARLY)
    GATED: tl.constexpr = LAYOUT != "ungated"
    INTERLEAVED: tl.constexpr = LAYOUT == "interleaved"
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
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
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * num_columns + column[None, :]
    out_mask = row_mask[:, None] & (column < num_columns)[None, :]
    if ZERO_SKIPPED:
        if expert == num_experts:
            tl.store(out_ptrs, tl.zeros((BLOCK_M, BLOCK_N), dtype=out_ptr.dtype.element_ty), mask=out_mask)
            return

    slot = slots_of_rows(early, sorted_slots_ptr, row, end_row, num_slots, num_experts, BLOCK_M)
    row_mask = row_mask & (slot >= 0) & (slot < num_slots)
    token = tl.where(row_mask, slot, 0) // topk
    # Rows of w1 of these columns. Columns behind the last one read that, and are not stored.
    lane = tl.arange(0, WIDTH)
    if INTERLEAVED:
        w_row = tile_n * WIDTH + lane
        if not EVEN_N:
            w_row = tl.minimum(w_row, 2 * num_columns - 1)
    else:
        w_row = tile_n * BLOCK_N + lane % BLOCK_N
        if not EVEN_N:
            w_row = tl.minimum(w_row, num_columns - 1)
        w_row += lane // BLOCK_N * num_columns
    acc = multiply(
        x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr,
        expert, w_row, token, row_mask, depth,
        stride_xm, stride_xk, stride_xsm, stride_xsk, stride_we, stride_wn, stride_wk,
        stride_se, stride_sn, stride_sk, stride_ze, stride_zn, stride_zk,
        SCALES_SUMS, IN_16_BITS, HAS_ZERO, PACKED, PACKED_ZEROS, ROWS, GROUP, ALIGNED, PRECISION, BLOCK_K, EVEN_K,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * stride_be + w_row * stride_bn)
        acc += bias.to(tl.float32)[:, None]
    if GATED:
        if INTERLEAVED:
            pairs = tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_M)), (2, 0, 1))
        else:
            pairs = tl.permute(tl.reshape(acc, (2, BLOCK_N, BLOCK_M)), (2, 1, 0))
        gate, up = tl.split(pairs)
        y = epilogue(gate, up)
    else:
        gate = tl.trans(acc)
        y = epilogue(gate, gate)
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=out_mask)


def launch_for(
    tile: Tile,
    out: Tensor,
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    weight_format: WeightFormat,
    bias: Tensor | None,
    epilogue_body: str,
    layout: str,
    zero_skipped: bool,
    precision: Precision,
) -> Launch:
    """The launch of the kernel with one tile."""
    num_slots, num_columns = out.shape
    num_experts, depth = w1.size(0), hidden_states.size(1)
    num_row_tiles = max_row_tiles(num_slots, num_experts + zero_skipped, tile.block_m)
    args = (
        out,
        hidden_states,
        w1 if hidden_states_scale is None else hidden_states_scale,
        w1,
        w1_scale,
        w1 if w1_zp is None else w1_zp,
        w1 if bias is None else bias,
        sorted_slots,
        expert_offsets,
        num_slots,
        num_row_tiles,
        topk,
        num_experts,
        num_columns,
        depth,
        *operands.strides(hidden_states, hidden_states_scale, w1, w1_scale, w1_zp),
        *((0, 0) if bias is None else bias.stride()),
    )
    options: dict[str, Any] = {
        "LAYOUT": layout,
        "HAS_BIAS": bias is not None,
        "ZERO_SKIPPED": zero_skipped,
        "E_POW2": triton.next_power_of_2(num_experts + 1),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "EVEN_N": num_columns % tile.block_n == 0,
        "GROUP_M": 8,
        "num_stages": tile.num_stages,
        "num_warps": tile.num_warps,
        **early_launch(out.device),
    }
    has_zero = w1_zp is not None
    if isinstance(tile, few_rows.FewRowsTile):
        options |= few_rows.constants(weight_format, has_zero, tile, depth)
        kernel = few_rows.with_format(
            few_rows_gather_gemm_kernel, weight_format, epilogue_body, DO_NOT_SPECIALIZE
        )
    else:
        in_16_bits = operands.dequantizes_in_16_bits(weight_format, hidden_states, w1_scale)
        options |= operands.constants(weight_format, has_zero, tile, depth, precision, in_16_bits)
        kernel = with_format(quantized_gather_gemm_kernel, weight_format, epilogue_body, DO_NOT_SPECIALIZE)
    return Launch(kernel, (num_row_tiles * triton.cdiv(num_columns, tile.block_n),), args, options)


def quantized_gather_gemm(
    out: Tensor,
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    weight_format: WeightFormat,
    bias: Tensor | None,
    epilogue_body: str,
    layout: str,
    zero_skipped: bool,
) -> None:
    """Launch into out (S, I), or (S, N) for layout "ungated"."""
    launch(
        _plan,
        out,
        hidden_states,
        hidden_states_scale,
        w1,
        w1_scale,
        w1_zp,
        sorted_slots,
        expert_offsets,
        topk,
        weight_format,
        bias,
        epilogue_body,
        layout,
        zero_skipped,
        dot_precision(hidden_states.dtype),
        row_tiles.scratch_if_needed(sorted_slots, w1.size(0), special_from(weight_format, w1)),
    )


def launches_for(tile: Tile, *arguments: Any) -> tuple[Launch, ...]:
    """Arguments: those of :func:`launch_for` behind the tile, and memory for row tiles, or None for some."""
    *arguments, tiles = arguments  # type: ignore[assignment]
    if not tile.warp_specialized:
        return (launch_for(tile, *arguments),)
    out, x, x_scale, w1, w1_scale, w1_zp, slots, offsets, topk, *rest = arguments
    weights, bias, body, layout, zero_skipped, _ = rest
    if tiles is None:
        tiles = row_tiles.scratch(slots, w1.size(0))
    launches: tuple[Launch, ...]
    if weights.scales_sums:
        inputs = (x, x_scale, w1, w1_scale, slots, offsets, topk)
        launches = eight_bit_gather_gemm.launches_for(
            tile, tiles, out, *inputs, bias, body, layout, block_rows(weights)
        )
    else:
        inputs = (x, w1, w1_scale, w1_zp, slots, offsets, topk)
        launches = decoding_launches.gather_launches_for(
            tile, tiles, out, *inputs, weights, bias, body, layout
        )
    if zero_skipped:
        launches = (*launches, zero_skipped_rows.launch_for(out, slots, offsets, w1.size(0), False))
    return launches


def _plan(*arguments: Any) -> Plan:
    """Arguments: those of :func:`launches_for` behind the tile."""
    out, x, _, w1, w1_scale, w1_zp, _, _, topk, *rest = arguments
    weight_format, bias, body, layout, zero_skipped, precision, _ = rest
    choice = tile_choice(x, w1, w1_scale, out, weight_format, layout != "ungated")
    # The arguments that code depends on are those of every tile.
    like = launch_for(choice.candidates[0], *arguments[:-1])
    key = (
        "quantized_gather_gemm",
        weight_format,
        body,
        layout,
        zero_skipped,
        precision,
        bias is not None,
        w1_zp is not None,
        topk,
        tuple(w1.shape),
        choice.candidates,
        like.args[_NUM_BEFORE_SIZES:],
        *map(pointer_key, like.args[:_NUM_POINTERS]),
    )
    return plan_of(key, choice, lambda each: launches_for(each, *arguments))
