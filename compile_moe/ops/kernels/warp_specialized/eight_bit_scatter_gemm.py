"""GEMM 2 on 8 bits, for many rows an expert on Hopper: scales of whole rows, or of blocks of floating point."""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.quantized import operands
from compile_moe.ops.kernels.tiles import Tile
from compile_moe.ops.kernels.warp_specialized import row_tiles
from compile_moe.ops.kernels.warp_specialized.descriptors import num_programs, plain_weights, rows, step
from compile_moe.ops.kernels.warp_specialized.eight_bit_consumer import eight_bit_consumer
from compile_moe.ops.kernels.warp_specialized.ring import allocate
from compile_moe.ops.kernels.warp_specialized.row_producer import producer_tma
from compile_moe.ops.kernels.warp_specialized.row_scales import allocate_scales
from compile_moe.ops.kernels.warp_specialized.scale_ring import allocate_scale_ring

REGISTERS, PRODUCER_REGISTERS = 224, 56


@gluon.jit(do_not_specialize=["num_slots", "num_n", "num_k", "columns8"])
def eight_bit_scatter_gemm_kernel(
    out_ptr,  # (S, columns), slot order
    x_desc,
    x256_desc,
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
    stride_be,
    stride_bn,
    stride_se,
    stride_sn,
    stride_sk,
    stride_xsm,
    stride_xsk,
    HAS_BIAS: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,  # of the weights, that share a scale for each 128 columns; 0: all columns share one
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty = allocate(
        x_desc.dtype,
        out_ptr.dtype.element_ty,
        STAGES,
        129 if BLOCK_ROWS else 1,
        ROWS=ROWS,
        TAILS=not BLOCK_ROWS,
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
                    slots_ptr, num_slots, num_k, columns8, 1,
                    stride_be, stride_bn, stride_se, stride_sn, stride_xsm,
                    0, STAGES, "none", HAS_BIAS, False, False, BLOCK_ROWS,
                ),
            ),
            (
                eight_bit_consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, scales_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, w_scale_ptr, x_scale_ptr,
                    slots_ptr, num_slots, num_k, columns8, 1,
                    stride_be, stride_bn, stride_se, stride_sn, stride_xsm,
                    1, STAGES, "none", HAS_BIAS, False, False, BLOCK_ROWS,
                ),
            ),
            (
                producer_tma,
                (
                    w_desc, x_desc, x256_desc, w_smem, x_smem, tail_smem, tile_smem, full, empty,
                    tiles_ptr, num_n, num_k, scales, STAGES, "none", BLOCK_ROWS,
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
    intermediate: Tensor,
    intermediate_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    block_rows: int,
) -> tuple[Launch, Launch]:
    """Row tiles, then the GEMM.

    Args:
        block_rows: of the weights, that share a scale for each 128 columns; 0: all columns share one.
    """
    num_slots, num_columns = out.shape
    args = (
        out,
        rows(intermediate, 32),
        rows(intermediate, 256),
        plain_weights(w2),
        out if bias is None else bias,
        w2_scale,
        intermediate_scale,
        sorted_slots,
        tiles,
        num_slots,
        triton.cdiv(num_columns, 128),
        triton.cdiv(w2.size(2), step(w2)),
        num_columns // 8,
        *((0, 0) if bias is None else bias.stride()),
        *operands.scale_strides(intermediate_scale, w2_scale),
    )
    options = {
        "HAS_BIAS": bias is not None,
        "ROWS": tile.block_m,
        "STAGES": tile.num_stages,
        "BLOCK_ROWS": block_rows,
        "REGISTERS": REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "num_warps": 4,
    }
    return (
        row_tiles.launch_for(tile.block_m, tiles, expert_offsets, num_slots, w2.size(0), not block_rows),
        Launch(eight_bit_scatter_gemm_kernel, (num_programs(out.device.index),), args, options),
    )
