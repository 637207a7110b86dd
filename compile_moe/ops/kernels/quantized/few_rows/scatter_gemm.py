"""GEMM 2 on quantized weights for few rows an expert: rows in expert order, each stored at its slot."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.early_launch import await_earlier_kernels
from compile_moe.ops.kernels.quantized.few_rows.layouts import stored_results
from compile_moe.ops.kernels.quantized.few_rows.multiply import fewest_tokens, multiply, takes
from compile_moe.ops.kernels.quantized.few_rows.stores import result_rows, store_results
from compile_moe.ops.kernels.tiles import grouped_order, tile_among


@gluon.jit
def slots_to_store(sorted_slots_ptr, first_row, end_row, TOKENS: gl.constexpr, WARPS: gl.constexpr):
    """Slots of rows first_row...; -1 from end_row on."""
    row = result_rows(first_row, TOKENS, WARPS)
    return gl.load(sorted_slots_ptr + row, mask=row < end_row, other=-1)


# The parameters of the kernel for any number of rows, of which some aren't read here.
def few_rows_scatter_gemm_kernel(
    out_ptr,  # (S, num_columns), contiguous, in slot order
    x_ptr,  # (S, I), in expert order
    x_scale_ptr,
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
    HAS_BIAS: gl.constexpr,
    ZERO_SKIPPED: gl.constexpr,
    E_POW2: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    EVEN_N: gl.constexpr,
    EVEN_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    PACKED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    EARLY: gl.constexpr,
):
    await_earlier_kernels(EARLY)
    tile_m, tile_n = grouped_order(gl.program_id(0), num_row_tiles, gl.cdiv(num_columns, BLOCK_N), GROUP_M)
    e = gl.arange(0, E_POW2, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    expert, first_row, end_row = tile_among(
        e, expert_offsets_ptr, tile_m, num_slots, num_experts, BLOCK_M, ZERO_SKIPPED
    )
    if expert > num_experts:
        return
    if ZERO_SKIPPED:
        if expert == num_experts:
            zeros = gl.zeros([BLOCK_M, BLOCK_N], out_ptr.dtype.element_ty, stored_results(WARPS))
            skipped = slots_to_store(sorted_slots_ptr, first_row, end_row, BLOCK_M, WARPS)
            is_slot = (skipped >= 0) & (skipped < num_slots)
            store_results(out_ptr, zeros, skipped, is_slot, tile_n, num_columns, WARPS)
            return

    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    for TOKENS in gl.static_range(fewest_tokens(BLOCK_M), BLOCK_M + 1, fewest_tokens(BLOCK_M)):
        if takes(end_row - first_row, TOKENS, BLOCK_M):
            # They arrive while the tile is multiplied.
            slot = slots_to_store(sorted_slots_ptr, first_row, end_row, TOKENS, WARPS)
            row = first_row + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, x_layout))
            row_mask = row < end_row
            acc = multiply(
                x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr,
                expert, tile_n, gl.where(row_mask, row, 0), row_mask, num_columns, depth,
                stride_xm, stride_we, stride_wn, stride_se, stride_sn, stride_sk, stride_ze, stride_zn, stride_zk,
                stride_be, stride_bn,
                "ungated", BLOCK_N, EVEN_N, EVEN_K, HAS_BIAS, HAS_ZERO,
                PACKED, PACKED_ZEROS, GROUP, STAGES, WARPS,
            )  # fmt: skip
            y = gl.permute(acc.to(out_ptr.dtype.element_ty), (1, 0))
            store_results(out_ptr, y, slot, (slot >= 0) & (slot < num_slots), tile_n, num_columns, WARPS)
