"""GEMM 2 on quantized weights: rows in expert order, each stored at its slot.

The weights are the left operand, which tensor cores take from registers, where they are dequantized.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.precision import Precision, dot_precision
from compile_moe.ops.kernels.quantized import operands
from compile_moe.ops.kernels.quantized.few_rows import launches as few_rows
from compile_moe.ops.kernels.quantized.few_rows.scatter_gemm import few_rows_scatter_gemm_kernel
from compile_moe.ops.kernels.quantized.multiply import multiply, with_format
from compile_moe.ops.kernels.quantized.tiles import block_rows, special_from, tile_choice
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat
from compile_moe.ops.kernels.tiles import Tile, grouped_order, locate_tile, max_row_tiles
from compile_moe.ops.kernels.tuned_tiles import plan_of
from compile_moe.ops.kernels.warp_specialized import decoding_launches, eight_bit_scatter_gemm, row_tiles
from compile_moe.ops.kernels.warp_specialized import zero_skipped as zero_skipped_rows

DO_NOT_SPECIALIZE = ("num_slots", "num_row_tiles")
_NUM_POINTERS, _NUM_BEFORE_SIZES = 9, 11


def quantized_scatter_gemm_kernel(
    out_ptr,  # (S, num_columns), contiguous, in slot order
    x_ptr,  # (S, I), in expert order
    x_scale_ptr,  # (S or 1, groups or 1)
    w_ptr,  # (E, K, I / packed)
    scale_ptr,
    zero_ptr,
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
    tile_m, tile_n = grouped_order(tl.program_id(0), num_row_tiles, tl.cdiv(num_columns, BLOCK_N), GROUP_M)
    expert, first_row, end_row = locate_tile(
        expert_offsets_ptr, tile_m, num_slots, num_experts, E_POW2, BLOCK_M, ZERO_SKIPPED
    )
    if expert > num_experts:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    row_mask = row < end_row
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(sorted_slots_ptr + row, mask=row_mask, other=0)
    store_mask = row_mask & (slot >= 0) & (slot < num_slots)
    out_ptrs = out_ptr + slot.to(tl.int64)[:, None] * num_columns + column[None, :]
    out_mask = store_mask[:, None] & (column < num_columns)[None, :]
    if ZERO_SKIPPED:
        if expert == num_experts:
            tl.store(out_ptrs, tl.zeros((BLOCK_M, BLOCK_N), dtype=out_ptr.dtype.element_ty), mask=out_mask)
            return

    # Columns behind the last one read that, and are not stored.
    w_row = column if EVEN_N else tl.minimum(column, num_columns - 1)
    acc = multiply(
        x_ptr, x_scale_ptr, w_ptr, scale_ptr, zero_ptr,
        expert, w_row, tl.where(row_mask, row, 0), row_mask, depth,
        stride_xm, stride_xk, stride_xsm, stride_xsk, stride_we, stride_wn, stride_wk,
        stride_se, stride_sn, stride_sk, stride_ze, stride_zn, stride_zk,
        SCALES_SUMS, IN_16_BITS, HAS_ZERO, PACKED, PACKED_ZEROS, ROWS, GROUP, ALIGNED, PRECISION, BLOCK_K, EVEN_K,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * stride_be + w_row * stride_bn)
        acc += bias.to(tl.float32)[:, None]
    tl.store(out_ptrs, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=out_mask)


def launch_for(
    tile: Tile,
    out: Tensor,
    intermediate: Tensor,
    intermediate_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    weight_format: WeightFormat,
    bias: Tensor | None,
    zero_skipped: bool,
    precision: Precision,
) -> Launch:
    """The launch of the kernel with one tile."""
    num_slots, num_columns = out.shape
    num_experts, depth = w2.size(0), intermediate.size(1)
    num_row_tiles = max_row_tiles(num_slots, num_experts + zero_skipped, tile.block_m)
    args = (
        out,
        intermediate,
        w2 if intermediate_scale is None else intermediate_scale,
        w2,
        w2_scale,
        w2 if w2_zp is None else w2_zp,
        w2 if bias is None else bias,
        sorted_slots,
        expert_offsets,
        num_slots,
        num_row_tiles,
        num_experts,
        num_columns,
        depth,
        *operands.strides(intermediate, intermediate_scale, w2, w2_scale, w2_zp),
        *((0, 0) if bias is None else bias.stride()),
    )
    options: dict[str, Any] = {
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
    has_zero = w2_zp is not None
    if isinstance(tile, few_rows.FewRowsTile):
        options |= few_rows.constants(weight_format, has_zero, tile, depth)
        kernel = few_rows.with_format(few_rows_scatter_gemm_kernel, weight_format, "", DO_NOT_SPECIALIZE)
    else:
        in_16_bits = operands.dequantizes_in_16_bits(weight_format, intermediate, w2_scale)
        options |= operands.constants(weight_format, has_zero, tile, depth, precision, in_16_bits)
        kernel = with_format(quantized_scatter_gemm_kernel, weight_format, "", DO_NOT_SPECIALIZE)
    return Launch(kernel, (num_row_tiles * triton.cdiv(num_columns, tile.block_n),), args, options)


def quantized_scatter_gemm(
    out: Tensor,
    intermediate: Tensor,
    intermediate_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    weight_format: WeightFormat,
    bias: Tensor | None,
    zero_skipped: bool,
) -> None:
    """Launch into out (S, K), contiguous."""
    launch(
        _plan,
        out,
        intermediate,
        intermediate_scale,
        w2,
        w2_scale,
        w2_zp,
        sorted_slots,
        expert_offsets,
        weight_format,
        bias,
        zero_skipped,
        dot_precision(intermediate.dtype),
        row_tiles.scratch_if_needed(sorted_slots, w2.size(0), special_from(weight_format, w2)),
    )


def launches_for(tile: Tile, *arguments: Any) -> tuple[Launch, ...]:
    """Arguments: those of :func:`launch_for` behind the tile, and memory for row tiles, or None for some."""
    *arguments, tiles = arguments  # type: ignore[assignment]
    if not tile.warp_specialized:
        return (launch_for(tile, *arguments),)
    out, x, x_scale, w2, w2_scale, w2_zp, slots, offsets, weights, bias, zero_skipped, _ = arguments
    if tiles is None:
        tiles = row_tiles.scratch(slots, w2.size(0))
    launches: tuple[Launch, ...]
    if weights.scales_sums:
        launches = eight_bit_scatter_gemm.launches_for(
            tile, tiles, out, x, x_scale, w2, w2_scale, slots, offsets, bias, block_rows(weights)
        )
    else:
        launches = decoding_launches.scatter_launches_for(
            tile, tiles, out, x, w2, w2_scale, w2_zp, slots, offsets, weights, bias
        )
    if zero_skipped:
        launches = (*launches, zero_skipped_rows.launch_for(out, slots, offsets, w2.size(0), True))
    return launches


def _plan(*arguments: Any) -> Plan:
    """Arguments: those of :func:`launches_for` behind the tile."""
    out, x, _, w2, w2_scale, w2_zp, _, _, weight_format, bias, zero_skipped, precision, _ = arguments
    choice = tile_choice(x, w2, w2_scale, out, weight_format, False)
    # The arguments that code depends on are those of every tile.
    like = launch_for(choice.candidates[0], *arguments[:-1])
    key = (
        "quantized_scatter_gemm",
        weight_format,
        zero_skipped,
        precision,
        bias is not None,
        w2_zp is not None,
        tuple(w2.shape),
        choice.candidates,
        like.args[_NUM_BEFORE_SIZES:],
        *map(pointer_key, like.args[:_NUM_POINTERS]),
    )
    return plan_of(key, choice, lambda each: launches_for(each, *arguments))
