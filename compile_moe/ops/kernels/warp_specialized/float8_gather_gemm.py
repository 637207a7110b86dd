"""GEMM 1 on 8-bit floating point, a scale for each token and weight row or fewer, for many rows an expert on Hopper."""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.quantized import operands
from compile_moe.ops.kernels.warp_specialized import float8_consumer as consumers
from compile_moe.ops.kernels.warp_specialized import row_tiles
from compile_moe.ops.kernels.warp_specialized.descriptors import (
    gated_weights,
    num_programs,
    plain_weights,
    step,
)
from compile_moe.ops.kernels.warp_specialized.float8_consumer import allocate_scales, float8_consumer
from compile_moe.ops.kernels.warp_specialized.gather_gemm import (
    PRODUCER_REGISTERS,
    REGISTERS,
    with_epilogue,
)
from compile_moe.ops.kernels.warp_specialized.producers import producer_gather
from compile_moe.ops.kernels.warp_specialized.ring import STAGES, allocate


def float8_gather_gemm_kernel(
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
    stride_xsm,
    EPILOGUE: gl.constexpr,  # "gated", "ungated"
    INTERLEAVED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    STAGES: gl.constexpr,
    EVEN_K: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    w_smem, x_smem, tail_smem, result_smem, full, empty = allocate(
        x_ptr.dtype.element_ty, out_ptr.dtype.element_ty, STAGES, 129
    )
    scales_smem, tail_scales_smem = allocate_scales()
    gl.warp_specialize(
        [
            (
                float8_consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, scales_smem, tail_scales_smem, full, empty,
                    out_ptr, bias_ptr, w_scale_ptr, x_scale_ptr,
                    slots_ptr, tiles_ptr, num_slots, num_n, num_k, columns8, topk,
                    stride_be, stride_bn, stride_se, stride_sn, stride_xsm,
                    0, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True,
                ),
            ),
            (
                float8_consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, scales_smem, tail_scales_smem, full, empty,
                    out_ptr, bias_ptr, w_scale_ptr, x_scale_ptr,
                    slots_ptr, tiles_ptr, num_slots, num_n, num_k, columns8, topk,
                    stride_be, stride_bn, stride_se, stride_sn, stride_xsm,
                    1, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True,
                ),
            ),
            (
                producer_gather,
                (
                    w_desc, x_ptr, slots_ptr, w_smem, x_smem, tail_smem, full, empty, tiles_ptr,
                    num_slots, num_n, num_k, row_stride16, depth16, topk, STAGES, EPILOGUE, EVEN_K,
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launches_for(
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
) -> tuple[Launch, Launch]:
    """Row tiles, then the GEMM."""
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
        *operands.row_scale_strides(hidden_states_scale, w1_scale),
    )
    options = {
        "EPILOGUE": "gated" if gated else "ungated",
        "INTERLEAVED": layout == "interleaved",
        "HAS_BIAS": bias is not None,
        "STAGES": STAGES,
        "EVEN_K": depth % step(w1) == 0,
        "REGISTERS": REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
        "num_warps": 4,
    }
    names = ("store_scaled_chunk", "consume_float8_tile", "float8_consumer")
    kernel = with_epilogue(float8_gather_gemm_kernel, consumers, names, epilogue_body)
    return (
        row_tiles.launch_for(tiles, expert_offsets, num_slots, w1.size(0)),
        Launch(kernel, (num_programs(out.device.index),), args, options),
    )
