"""GEMM 1 on quantized weights for few rows an expert: the activation where a thread has gate and up."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.early_launch import await_earlier_kernels
from compile_moe.ops.kernels.epilogue import epilogue
from compile_moe.ops.kernels.quantized.few_rows.layouts import stored_results
from compile_moe.ops.kernels.quantized.few_rows.multiply import fewest_tokens, multiply, takes
from compile_moe.ops.kernels.quantized.few_rows.stores import result_rows, store_results
from compile_moe.ops.kernels.tiles import early_slots, grouped_order, slots_of_rows, tile_among


# The parameters of the kernel for any number of rows, of which some aren't read here.
def few_rows_gather_gemm_kernel(
    out_ptr,  # (S, num_columns), contiguous
    x_ptr,  # (M, K)
    x_scale_ptr,
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
    LAYOUT: gl.constexpr,
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
    GATED: gl.constexpr = LAYOUT != "ungated"
    ROWS: gl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    tile_m, tile_n = grouped_order(gl.program_id(0), num_row_tiles, gl.cdiv(num_columns, BLOCK_N), GROUP_M)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    tile_row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, x_layout))
    early = early_slots(sorted_slots_ptr, tile_m + tile_row, num_slots, num_experts, BLOCK_M)
    e = gl.arange(0, E_POW2, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    expert, first_row, end_row = tile_among(
        e, expert_offsets_ptr, tile_m, num_slots, num_experts, BLOCK_M, ZERO_SKIPPED
    )
    if expert > num_experts:
        return
    if ZERO_SKIPPED:
        if expert == num_experts:
            zeros = gl.zeros([BLOCK_M, BLOCK_N], out_ptr.dtype.element_ty, stored_results(WARPS))
            skipped = result_rows(first_row, BLOCK_M, WARPS)
            store_results(out_ptr, zeros, skipped, skipped < end_row, tile_n, num_columns, WARPS)
            return

    for TOKENS in gl.static_range(fewest_tokens(BLOCK_M), BLOCK_M + 1, fewest_tokens(BLOCK_M)):
        if takes(end_row - first_row, TOKENS, BLOCK_M):
            row = first_row + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, x_layout))
            if TOKENS == BLOCK_M:
                slot = slots_of_rows(early, sorted_slots_ptr, row, end_row, num_slots, num_experts, BLOCK_M)
            else:
                slot = gl.load(sorted_slots_ptr + row, mask=row < end_row, other=-1)
            row_mask = (row < end_row) & (slot >= 0) & (slot < num_slots)
            token = gl.where(row_mask, slot, 0) // topk
            acc = multiply(
                x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr,
                expert, tile_n, token, row_mask, num_columns, depth,
                stride_xm, stride_we, stride_wn, stride_se, stride_sn, stride_sk, stride_ze, stride_zn, stride_zk,
                stride_be, stride_bn,
                LAYOUT, ROWS, EVEN_N, EVEN_K, HAS_BIAS, HAS_ZERO,
                PACKED, PACKED_ZEROS, GROUP, STAGES, WARPS,
            )  # fmt: skip
            if GATED:
                pairs = gl.permute(gl.reshape(acc, [ROWS // 16, 2, 8, TOKENS]), (0, 2, 3, 1))
                gate, up = gl.split(pairs)
                y = gl.reshape(epilogue(gate, up).to(out_ptr.dtype.element_ty), [BLOCK_N, TOKENS])
            else:
                y = epilogue(acc, acc).to(out_ptr.dtype.element_ty)
            out_row = result_rows(first_row, TOKENS, WARPS)
            y = gl.permute(y, (1, 0))
            store_results(out_ptr, y, out_row, out_row < end_row, tile_n, num_columns, WARPS)
