"""Both GEMMs on weights that are stored in 4 or 8 bits and multiplied in 16, for many rows an expert on Hopper.

As those on 16-bit weights, but for producers, one or two, which decode them: each weight once for all tokens of a
stage, up to 96, 160 or 288, where the kernels for fewer rows decode it for every tile of these.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.warp_specialized.consumer import consumer
from compile_moe.ops.kernels.warp_specialized.decoding_producers import decoding_producer
from compile_moe.ops.kernels.warp_specialized.ring import allocate
from compile_moe.ops.kernels.warp_specialized.stored_weights import allocate_stored_ring


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
    SLOTS: gl.constexpr,
    DECODERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    w_smem, x_smem, tail_smem, result_smem, full, empty = allocate(
        x_ptr.dtype.element_ty, out_ptr.dtype.element_ty, STAGES, 129, ROWS=ROWS
    )
    stored = allocate_stored_ring(SLOTS, PACKED)
    scales = (scale_ptr, stride_se, stride_sn, stride_sk)
    zeros = (zero_ptr, stride_ze, stride_zn, stride_zk)
    row_scales = (scale_ptr, stride_se, stride_sn)
    if DECODERS == 1:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (
                        w_smem, x_smem, tail_smem, result_smem, full, empty, out_ptr, bias_ptr, slots_ptr, tiles_ptr,
                        num_slots, num_n, num_k, columns8, stride_be, stride_bn, row_scales,
                        0, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, False, GROUP == 0,
                    ),
                ),
                (
                    consumer,
                    (
                        w_smem, x_smem, tail_smem, result_smem, full, empty, out_ptr, bias_ptr, slots_ptr, tiles_ptr,
                        num_slots, num_n, num_k, columns8, stride_be, stride_bn, row_scales,
                        1, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, False, GROUP == 0,
                    ),
                ),
                (
                    decoding_producer,
                    (
                        (x_ptr, row_stride16, depth16, topk), slots_ptr, w_desc, stored, scales, zeros, num_groups,
                        w_smem, x_smem, tail_smem, full, empty, tiles_ptr, num_slots, num_n, num_k, columns8,
                        STAGES, EPILOGUE, EVEN_K, INTERLEAVED, True, GROUP, HAS_ZERO, PACKED, PACKED_ZEROS, 0, DECODERS,
                    ),
                ),
            ],
            [4, 4],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        other_stored = allocate_stored_ring(SLOTS, PACKED)
        gl.warp_specialize(
            [
                (
                    consumer,
                    (
                        w_smem, x_smem, tail_smem, result_smem, full, empty, out_ptr, bias_ptr, slots_ptr, tiles_ptr,
                        num_slots, num_n, num_k, columns8, stride_be, stride_bn, row_scales,
                        0, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, False, GROUP == 0,
                    ),
                ),
                (
                    consumer,
                    (
                        w_smem, x_smem, tail_smem, result_smem, full, empty, out_ptr, bias_ptr, slots_ptr, tiles_ptr,
                        num_slots, num_n, num_k, columns8, stride_be, stride_bn, row_scales,
                        1, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, True, False, GROUP == 0,
                    ),
                ),
                (
                    decoding_producer,
                    (
                        (x_ptr, row_stride16, depth16, topk), slots_ptr, w_desc, stored, scales, zeros, num_groups,
                        w_smem, x_smem, tail_smem, full, empty, tiles_ptr, num_slots, num_n, num_k, columns8,
                        STAGES, EPILOGUE, EVEN_K, INTERLEAVED, True, GROUP, HAS_ZERO, PACKED, PACKED_ZEROS, 0, DECODERS,
                    ),
                ),
                (
                    decoding_producer,
                    (
                        (x_ptr, row_stride16, depth16, topk), slots_ptr, w_desc, other_stored, scales, zeros,
                        num_groups, w_smem, x_smem, tail_smem, full, empty, tiles_ptr, num_slots, num_n, num_k,
                        columns8,
                        STAGES, EPILOGUE, EVEN_K, INTERLEAVED, True, GROUP, HAS_ZERO, PACKED, PACKED_ZEROS, 1, DECODERS,
                    ),
                ),
            ],
            [4, 4, 4],
            [REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
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
    SLOTS: gl.constexpr,
    DECODERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    w_smem, x_smem, tail_smem, result_smem, full, empty = allocate(
        x_desc.dtype, out_ptr.dtype.element_ty, STAGES, 2, ROWS=ROWS
    )
    stored = allocate_stored_ring(SLOTS, PACKED)
    scales = (scale_ptr, stride_se, stride_sn, stride_sk)
    zeros = (zero_ptr, stride_ze, stride_zn, stride_zk)
    row_scales = (scale_ptr, stride_se, stride_sn)
    if DECODERS == 1:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (
                        w_smem, x_smem, tail_smem, result_smem, full, empty, out_ptr, bias_ptr, slots_ptr, tiles_ptr,
                        num_slots, num_n, num_k, columns8, stride_be, stride_bn, row_scales,
                        0, STAGES, "none", HAS_BIAS, False, False, False, GROUP == 0,
                    ),
                ),
                (
                    consumer,
                    (
                        w_smem, x_smem, tail_smem, result_smem, full, empty, out_ptr, bias_ptr, slots_ptr, tiles_ptr,
                        num_slots, num_n, num_k, columns8, stride_be, stride_bn, row_scales,
                        1, STAGES, "none", HAS_BIAS, False, False, False, GROUP == 0,
                    ),
                ),
                (
                    decoding_producer,
                    (
                        (x_desc, x256_desc), slots_ptr, w_desc, stored, scales, zeros, num_groups,
                        w_smem, x_smem, tail_smem, full, empty, tiles_ptr, num_slots, num_n, num_k, columns8,
                        STAGES, "none", True, False, False, GROUP, HAS_ZERO, PACKED, PACKED_ZEROS, 0, DECODERS,
                    ),
                ),
            ],
            [4, 4],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        other_stored = allocate_stored_ring(SLOTS, PACKED)
        gl.warp_specialize(
            [
                (
                    consumer,
                    (
                        w_smem, x_smem, tail_smem, result_smem, full, empty, out_ptr, bias_ptr, slots_ptr, tiles_ptr,
                        num_slots, num_n, num_k, columns8, stride_be, stride_bn, row_scales,
                        0, STAGES, "none", HAS_BIAS, False, False, False, GROUP == 0,
                    ),
                ),
                (
                    consumer,
                    (
                        w_smem, x_smem, tail_smem, result_smem, full, empty, out_ptr, bias_ptr, slots_ptr, tiles_ptr,
                        num_slots, num_n, num_k, columns8, stride_be, stride_bn, row_scales,
                        1, STAGES, "none", HAS_BIAS, False, False, False, GROUP == 0,
                    ),
                ),
                (
                    decoding_producer,
                    (
                        (x_desc, x256_desc), slots_ptr, w_desc, stored, scales, zeros, num_groups,
                        w_smem, x_smem, tail_smem, full, empty, tiles_ptr, num_slots, num_n, num_k, columns8,
                        STAGES, "none", True, False, False, GROUP, HAS_ZERO, PACKED, PACKED_ZEROS, 0, DECODERS,
                    ),
                ),
                (
                    decoding_producer,
                    (
                        (x_desc, x256_desc), slots_ptr, w_desc, other_stored, scales, zeros, num_groups,
                        w_smem, x_smem, tail_smem, full, empty, tiles_ptr, num_slots, num_n, num_k, columns8,
                        STAGES, "none", True, False, False, GROUP, HAS_ZERO, PACKED, PACKED_ZEROS, 1, DECODERS,
                    ),
                ),
            ],
            [4, 4, 4],
            [REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
