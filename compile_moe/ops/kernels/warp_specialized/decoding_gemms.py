"""Both GEMMs on weights that are stored in 4 or 8 bits and multiplied in 16, for many rows an expert on Hopper.

As those on 16-bit weights, but the consumers decode each weight, in registers, once for up to 288 tokens.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.warp_specialized.consumer import consumer
from compile_moe.ops.kernels.warp_specialized.gather_producer import producer_gather
from compile_moe.ops.kernels.warp_specialized.ring import allocate
from compile_moe.ops.kernels.warp_specialized.row_producer import producer_tma


def decoding_gather_gemm_kernel(
    out_ptr,  # (S, columns), expert order
    x_ptr,  # (M, K)
    w_desc,
    bias_ptr,
    scale_ptr,
    zero_ptr,
    slots_ptr,
    tiles_ptr,
    num_slots,
    num_n,
    num_k,
    columns8,
    num_groups,
    depth16,
    row_stride16,
    topk,
    stride_be,
    stride_bn,
    stride_se,
    stride_sn,
    stride_sk,
    stride_ze,
    stride_zn,
    stride_zk,
    EPILOGUE: gl.constexpr,  # "gated", "ungated"
    INTERLEAVED: gl.constexpr,
    EVEN_K: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    GROUP: gl.constexpr,
    PACKED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty = allocate(
        x_ptr.dtype.element_ty, out_ptr.dtype.element_ty, STAGES, 129, ROWS=ROWS, STORED_BYTES=64 // PACKED
    )
    row_scales = (scale_ptr, stride_se, stride_sn)
    stored = (
        (scale_ptr, stride_se, stride_sn, stride_sk), (zero_ptr, stride_ze, stride_zn, stride_zk), num_groups,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, slots_ptr, num_slots, num_k, columns8, stride_be, stride_bn,
                    row_scales, stored, 0, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, False, GROUP == 0,
                    PACKED, GROUP, HAS_ZERO, PACKED_ZEROS,
                ),
            ),
            (
                consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, slots_ptr, num_slots, num_k, columns8, stride_be, stride_bn,
                    row_scales, stored, 1, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, False, GROUP == 0,
                    PACKED, GROUP, HAS_ZERO, PACKED_ZEROS,
                ),
            ),
            (
                producer_gather,
                (
                    w_desc, x_ptr, slots_ptr, w_smem, x_smem, tail_smem, tile_smem, full, empty, tiles_ptr,
                    num_slots, num_n, num_k, row_stride16, depth16, topk, (), STAGES, EPILOGUE, EVEN_K, INTERLEAVED, 0,
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def decoding_scatter_gemm_kernel(
    out_ptr,  # (S, columns), slot order
    x_desc,
    x256_desc,
    w_desc,
    bias_ptr,
    scale_ptr,
    zero_ptr,
    slots_ptr,
    tiles_ptr,
    num_slots,
    num_n,
    num_k,
    columns8,
    num_groups,
    stride_be,
    stride_bn,
    stride_se,
    stride_sn,
    stride_sk,
    stride_ze,
    stride_zn,
    stride_zk,
    HAS_BIAS: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    GROUP: gl.constexpr,
    PACKED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty = allocate(
        x_desc.dtype, out_ptr.dtype.element_ty, STAGES, 1, ROWS=ROWS, STORED_BYTES=64 // PACKED
    )
    row_scales = (scale_ptr, stride_se, stride_sn)
    stored = (
        (scale_ptr, stride_se, stride_sn, stride_sk), (zero_ptr, stride_ze, stride_zn, stride_zk), num_groups,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, slots_ptr, num_slots, num_k, columns8, stride_be, stride_bn,
                    row_scales, stored, 0, STAGES, "none", HAS_BIAS, False, False, False, GROUP == 0,
                    PACKED, GROUP, HAS_ZERO, PACKED_ZEROS,
                ),
            ),
            (
                consumer,
                (
                    w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty,
                    out_ptr, bias_ptr, slots_ptr, num_slots, num_k, columns8, stride_be, stride_bn,
                    row_scales, stored, 1, STAGES, "none", HAS_BIAS, False, False, False, GROUP == 0,
                    PACKED, GROUP, HAS_ZERO, PACKED_ZEROS,
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
