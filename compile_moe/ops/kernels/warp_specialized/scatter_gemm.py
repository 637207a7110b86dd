"""GEMM 2 for many rows an expert on Hopper: both operands by TMA, rows scattered to their slots."""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.tiles import Tile
from compile_moe.ops.kernels.warp_specialized import row_tiles
from compile_moe.ops.kernels.warp_specialized.consumer import consumer
from compile_moe.ops.kernels.warp_specialized.descriptors import (
    num_programs,
    plain_weights,
    rows,
    transposed_weights,
)
from compile_moe.ops.kernels.warp_specialized.ring import allocate
from compile_moe.ops.kernels.warp_specialized.row_producer import producer_tma

REGISTERS, PRODUCER_REGISTERS = 232, 40


@gluon.jit(do_not_specialize=["num_slots", "num_n", "num_k", "columns8"])
def scatter_gemm_kernel(
    out_ptr,  # (S, columns), slot order
    x_desc,
    x256_desc,
    w_desc,
    bias_ptr,
    slots_ptr,
    tiles_ptr,
    num_slots,
    num_n,
    num_k,
    columns8,
    stride_be,
    stride_bn,
    HAS_BIAS: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty = allocate(
        x_desc.dtype, out_ptr.dtype.element_ty, STAGES, 1, ROWS=ROWS, PARTS=PARTS
    )
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, slots_ptr, num_slots, num_k, columns8, stride_be, stride_bn,
                    (), (), 0, STAGES, "none", HAS_BIAS, False, False, TRANSPOSED, False,
                ),
            ),
            (
                consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, slots_ptr, num_slots, num_k, columns8, stride_be, stride_bn,
                    (), (), 1, STAGES, "none", HAS_BIAS, False, False, TRANSPOSED, False,
                ),
            ),
            (
                producer_tma,
                (
                    w_desc, x_desc, x256_desc, w_smem, x_smem, tail_smem, tile_smem, full, empty,
                    tiles_ptr, num_n, num_k, (), STAGES, "none", 0,
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
    w2: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
) -> tuple[Launch, Launch]:
    """Row tiles, then the GEMM."""
    num_slots, num_columns = out.shape
    transposed = w2.stride(2) != 1
    args = (
        out,
        rows(intermediate, 32),
        rows(intermediate, 256),
        transposed_weights(w2) if transposed else plain_weights(w2),
        out if bias is None else bias,
        sorted_slots,
        tiles,
        num_slots,
        triton.cdiv(num_columns, tile.block_n),
        triton.cdiv(w2.size(2), 64),
        num_columns // 8,
        *((0, 0) if bias is None else bias.stride()),
    )
    options = {
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias is not None,
        "ROWS": tile.block_m,
        "STAGES": tile.num_stages,
        "PARTS": tile.block_n // 128,
        "REGISTERS": REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "num_warps": 4,
    }
    return (
        row_tiles.launch_for(tile.block_m, tiles, expert_offsets, num_slots, w2.size(0)),
        Launch(scatter_gemm_kernel, (num_programs(out.device.index),), args, options),
    )
