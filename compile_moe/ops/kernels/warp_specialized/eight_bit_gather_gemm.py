"""GEMM 1 on 8 bits, for many rows an expert on Hopper: scales of whole rows, or of blocks of floating point."""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.quantized import operands
from compile_moe.ops.kernels.tiles import Tile
from compile_moe.ops.kernels.warp_specialized import eight_bit_consumer as consumers
from compile_moe.ops.kernels.warp_specialized import float8_blocks, row_tiles
from compile_moe.ops.kernels.warp_specialized.descriptors import (
    gated_weights,
    num_programs,
    plain_weights,
    step,
)
from compile_moe.ops.kernels.warp_specialized.eight_bit_consumer import eight_bit_consumer
from compile_moe.ops.kernels.warp_specialized.gather_gemm import (
    PRODUCER_REGISTERS,
    REGISTERS,
    with_epilogue,
)
from compile_moe.ops.kernels.warp_specialized.gather_producer import producer_gather
from compile_moe.ops.kernels.warp_specialized.ring import allocate
from compile_moe.ops.kernels.warp_specialized.row_scales import allocate_scales
from compile_moe.ops.kernels.warp_specialized.scale_ring import allocate_scale_ring

#: That store results or call such.
FUNCTIONS = (
    (float8_blocks, "store_sums"),
    (float8_blocks, "consume_block_tile"),
    (consumers, "store_scaled_chunk"),
    (consumers, "consume_eight_bit_tile"),
    (consumers, "eight_bit_consumer"),
)


def eight_bit_gather_gemm_kernel(
    out_ptr,  # (S, columns), expert order
    x_ptr,  # (M, K)
    w_desc,
    bias_ptr,
    w_scale_ptr,
    x_scale_ptr,
    slots_ptr,
    tiles_ptr,
    num_slots,
    num_n,
    num_k,
    columns8,
    depth16,
    row_stride16,
    topk,
    stride_be,
    stride_bn,
    stride_se,
    stride_sn,
    stride_sk,
    stride_xsm,
    stride_xsk,
    EPILOGUE: gl.constexpr,  # "gated", "ungated"
    INTERLEAVED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    EVEN_K: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,  # of the weights, that share a scale for each 128 columns; 0: all columns share one
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty = allocate(
        x_ptr.dtype.element_ty, out_ptr.dtype.element_ty, STAGES, 129, ROWS=ROWS, TAILS=not BLOCK_ROWS
    )
    if BLOCK_ROWS:
        scales_smem = allocate_scale_ring(STAGES)
    else:
        scales_smem = allocate_scales()
    scales = (
        x_scale_ptr, stride_xsm, stride_xsk, w_scale_ptr, stride_se, stride_sn, stride_sk, columns8, scales_smem,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                eight_bit_consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, scales_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, w_scale_ptr, x_scale_ptr,
                    slots_ptr, num_slots, num_k, columns8, topk,
                    stride_be, stride_bn, stride_se, stride_sn, stride_xsm,
                    0, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, BLOCK_ROWS,
                ),
            ),
            (
                eight_bit_consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, scales_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, w_scale_ptr, x_scale_ptr,
                    slots_ptr, num_slots, num_k, columns8, topk,
                    stride_be, stride_bn, stride_se, stride_sn, stride_xsm,
                    1, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, BLOCK_ROWS,
                ),
            ),
            (
                producer_gather,
                (
                    w_desc, x_ptr, slots_ptr, w_smem, x_smem, tail_smem, tile_smem, full, empty, tiles_ptr,
                    num_slots, num_n, num_k, row_stride16, depth16, topk, scales,
                    STAGES, EPILOGUE, EVEN_K, INTERLEAVED, BLOCK_ROWS,
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launches_for(
    tile: Tile,
    tiles: Tensor,
    out: Tensor,
    hidden_states: Tensor,
    hidden_states_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    topk: int,
    bias: Tensor | None,
    epilogue_body: str,
    layout: str,
    block_rows: int,
) -> tuple[Launch, Launch]:
    """Row tiles, then the GEMM.

    Args:
        block_rows: of the weights, that share a scale for each 128 columns; 0: all columns share one.
    """
    num_slots, num_columns = out.shape
    gated = layout != "ungated"
    depth = hidden_states.size(1)
    args = (
        out,
        hidden_states,
        gated_weights(w1, layout) if gated else plain_weights(w1),
        out if bias is None else bias,
        w1_scale,
        hidden_states_scale,
        sorted_slots,
        tiles,
        num_slots,
        triton.cdiv(num_columns, 64 if gated else 128),
        triton.cdiv(depth, step(w1)),
        num_columns // 8,
        depth // 16,
        hidden_states.stride(0) // 16,
        topk,
        *((0, 0) if bias is None else bias.stride()),
        *operands.scale_strides(hidden_states_scale, w1_scale),
    )
    options = {
        "EPILOGUE": "gated" if gated else "ungated",
        "INTERLEAVED": layout == "interleaved",
        "HAS_BIAS": bias is not None,
        "ROWS": tile.block_m,
        "STAGES": tile.num_stages,
        "EVEN_K": depth % step(w1) == 0,
        "BLOCK_ROWS": block_rows,
        "REGISTERS": REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "num_warps": 4,
    }
    kernel = with_epilogue(eight_bit_gather_gemm_kernel, FUNCTIONS, epilogue_body)
    return (
        row_tiles.launch_for(tile.block_m, tiles, expert_offsets, num_slots, w1.size(0), not block_rows),
        Launch(kernel, (num_programs(out.device.index),), args, options),
    )
