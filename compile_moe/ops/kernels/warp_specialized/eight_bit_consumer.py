"""Consumers of 8 bits: in floating point sums of each step added outside the tensor cores, scales, then as others do.

Hopper's tensor cores add products of such numbers with 14 bits only. So what they sum up is one step of the ring (128
products), and float32 adds the steps. Of int8, with scales of whole rows alone, sums are integers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from compile_moe.ops.kernels.warp_specialized.compat import view, warps_barrier
from compile_moe.ops.kernels.warp_specialized.consumer import is_kind, load_bias
from compile_moe.ops.kernels.warp_specialized.eight_bit_sums import add_products, chunk_of, step_sums
from compile_moe.ops.kernels.warp_specialized.float8_blocks import consume_block_tile
from compile_moe.ops.kernels.warp_specialized.ring import announced_tile, next_stage
from compile_moe.ops.kernels.warp_specialized.row_scales import copy_row_scales, scaled
from compile_moe.ops.kernels.warp_specialized.scale_ring import has_two_scales
from compile_moe.ops.kernels.warp_specialized.store import result_columns, row_slots, store_chunk
from compile_moe.ops.kernels.warp_specialized.weight_rows import weight_rows


@gluon.jit
def store_scaled_chunk(
    acc,
    bias,
    w_scale,
    scales_smem,
    x_scale_ptr,
    stride_xsm,
    result_smem,
    out_ptr,
    slots_ptr,
    first,
    rows,
    num_slots,
    column8,
    columns8,
    EPILOGUE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATHER: gl.constexpr,
    T: gl.constexpr,
):
    if rows > 0:
        slot = row_slots(slots_ptr, first, rows, num_slots, T, EPILOGUE)
        y = scaled(acc, w_scale, scales_smem, x_scale_ptr, stride_xsm, first, rows, T, GATHER)
        store_chunk(y, bias, result_smem, out_ptr, slot, rows, column8, columns8, EPILOGUE, HAS_BIAS, T)


@gluon.jit
def consume_eight_bit_tile(
    w_smem,
    x_smem,
    tail_smem,
    result_smem,
    scales_smem,
    tail_scales_smem,
    full,
    empty,
    stage,
    phase,
    num_k,
    bias,
    w_scale,
    x_scale_ptr,
    stride_xsm,
    out_ptr,
    slots_ptr,
    first,
    rows,
    num_slots,
    topk,
    column8,
    columns8,
    WHICH: gl.constexpr,
    MAIN: gl.constexpr,
    TAIL: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATHER: gl.constexpr,
):
    """One consumer's 64 weight rows times MAIN + TAIL tokens of a tile."""
    # Sums of a step beside those of all steps: as many columns of them at a time as there are registers for.
    ROWS: gl.constexpr = x_smem.shape[0] // STAGES * 32
    PART: gl.constexpr = MAIN if MAIN < 128 else (64 if TAIL and MAIN == 256 else 128)
    PARTS: gl.constexpr = MAIN // PART
    STEP: gl.constexpr = x_smem.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 32])
    SUM: gl.constexpr = gl.int32 if w_smem.dtype == gl.int8 else gl.float32
    acc0 = gl.zeros([64, PART], SUM, layout)
    if PARTS > 1:
        acc1 = gl.zeros([64, PART], SUM, layout)
    else:
        acc1 = 0
    if PARTS > 2:
        acc2 = gl.zeros([64, PART], SUM, layout)
        acc3 = gl.zeros([64, PART], SUM, layout)
    else:
        acc2 = 0
        acc3 = 0
    if TAIL:
        tail = gl.zeros([64, 32], SUM, tail_layout)
    else:
        tail = 0
    # Copies that the products hide.
    if GATHER:
        # The tile before has read its own.
        warps_barrier()
        copy_row_scales(
            scales_smem.slice(0, MAIN), x_scale_ptr, stride_xsm, slots_ptr, first, rows, num_slots, topk, MAIN
        )
        if TAIL:
            copy_row_scales(
                tail_scales_smem,
                x_scale_ptr,
                stride_xsm,
                slots_ptr,
                first + MAIN,
                rows - MAIN,
                num_slots,
                topk,
                32,
            )
        async_copy.commit_group()
    boxes = view(x_smem, [STAGES * (ROWS // PART), PART, STEP], x_smem.layout)
    for _ in range(num_k):
        mbarrier.wait(full.index(stage), phase)
        if GATHER:
            # cp.async wrote x through the generic proxy.
            fence_async_shared()
        w = w_smem.index(2 * stage + WHICH)
        box = stage * (ROWS // PART)
        if SUM == gl.int32:
            acc0 = add_products(w, boxes.index(box), acc0)
            if PARTS > 1:
                acc1 = add_products(w, boxes.index(box + 1), acc1)
            if PARTS > 2:
                acc2 = add_products(w, boxes.index(box + 2), acc2)
                acc3 = add_products(w, boxes.index(box + 3), acc3)
            if TAIL:
                tail = add_products(w, tail_smem.index(stage), tail)
                tail = warpgroup_mma_wait(0, deps=(tail,))
            acc0 = warpgroup_mma_wait(0, deps=(acc0,))
            if PARTS > 1:
                acc1 = warpgroup_mma_wait(0, deps=(acc1,))
            if PARTS > 2:
                acc2 = warpgroup_mma_wait(0, deps=(acc2,))
                acc3 = warpgroup_mma_wait(0, deps=(acc3,))
            warps_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
        else:
            sums = step_sums(w, boxes.index(box), PART, layout)
            if PARTS > 1:
                acc0 += warpgroup_mma_wait(0, deps=(sums,))
                sums = step_sums(w, boxes.index(box + 1), PART, layout)
            if PARTS > 2:
                acc1 += warpgroup_mma_wait(0, deps=(sums,))
                sums = step_sums(w, boxes.index(box + 2), PART, layout)
                acc2 += warpgroup_mma_wait(0, deps=(sums,))
                sums = step_sums(w, boxes.index(box + 3), PART, layout)
            if TAIL and PARTS > 2:
                # After the others: both at once don't fit the registers.
                acc3 += warpgroup_mma_wait(0, deps=(sums,))
                tail_sums = step_sums(w, tail_smem.index(stage), 32, tail_layout)
                tail += warpgroup_mma_wait(0, deps=(tail_sums,))
            elif TAIL:
                tail_sums = step_sums(w, tail_smem.index(stage), 32, tail_layout)
                sums, tail_sums = warpgroup_mma_wait(0, deps=(sums, tail_sums))
                tail += tail_sums
            else:
                sums = warpgroup_mma_wait(0, deps=(sums,))
            warps_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            if PARTS == 1:
                acc0 += sums
            elif PARTS == 2:
                acc1 += sums
        stage, phase = next_stage(stage, phase, STAGES)
    if GATHER:
        async_copy.wait_group(0)
        warps_barrier()
    for i in gl.static_range(MAIN // 64):
        chunk = chunk_of(acc0, acc1, acc2, acc3, i, PART)
        store_scaled_chunk(
            chunk, bias, w_scale, scales_smem.slice(64 * i, 64), x_scale_ptr, stride_xsm, result_smem, out_ptr,
            slots_ptr, first + 64 * i, rows - 64 * i, num_slots, column8, columns8, EPILOGUE, HAS_BIAS, GATHER, 64,
        )  # fmt: skip
    if TAIL:
        store_scaled_chunk(
            tail, bias, w_scale, tail_scales_smem, x_scale_ptr, stride_xsm, result_smem, out_ptr,
            slots_ptr, first + MAIN, rows - MAIN, num_slots, column8, columns8, EPILOGUE, HAS_BIAS, GATHER, 32,
        )  # fmt: skip
    return stage, phase


@gluon.jit
def eight_bit_consumer(
    w_smem,
    x_smem,
    tail_smem,
    result_smem,
    scales_smem,
    tile_smem,
    full,
    empty,
    out_ptr,
    bias_ptr,
    w_scale_ptr,
    x_scale_ptr,
    slots_ptr,
    num_slots,
    num_k,
    columns8,
    topk,
    stride_be,
    stride_bn,
    stride_se,
    stride_sn,
    stride_xsm,
    WHICH: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    GATHER: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
):
    """Every tile of this program, as ``consumer`` does.

    ``scales_smem`` is what ``allocate_scale_ring`` returns where BLOCK_ROWS of the weights share scales, and tiles have
    no tails then; else what ``allocate_scales`` does.
    """
    stage = 0
    phase = 0
    result_smem = result_smem.index(WHICH)
    WIDTH8: gl.constexpr = result_columns(EPILOGUE) // 8
    # 64, 128 or 256 tokens, without and with a tail, of which a smaller ring has the first ones.
    BOXES: gl.constexpr = x_smem.shape[0] // STAGES
    KINDS: gl.constexpr = 6 if BOXES == 8 else 4 if BOXES == 4 else 2
    rows = 0
    while rows >= 0:
        mbarrier.wait(full.index(stage), phase)
        expert, first, rows, tile_n = announced_tile(tile_smem, stage)
        biases = bias_ptr + expert.to(gl.int64) * stride_be
        if BLOCK_ROWS:
            for i in gl.static_range(0, KINDS, 2):
                if is_kind(rows, i, False):
                    stage, phase = consume_block_tile(
                        w_smem, x_smem, result_smem, scales_smem, full, empty, stage, phase, num_k,
                        out_ptr, biases, stride_bn, slots_ptr, first, rows, num_slots, tile_n, columns8,
                        WHICH, 64 << (i // 2), STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED, GATHER,
                        has_two_scales(EPILOGUE, INTERLEAVED),
                    )  # fmt: skip
        else:
            column8 = (2 * tile_n + WHICH) * WIDTH8
            bias = load_bias(biases, stride_bn, column8, columns8, EPILOGUE, HAS_BIAS, INTERLEAVED)
            scales = w_scale_ptr + expert.to(gl.int64) * stride_se
            layout: gl.constexpr = bias.type.layout
            column, mask = weight_rows(column8, columns8, EPILOGUE, INTERLEAVED, layout)
            w_scale = gl.load(scales + column.to(gl.int64) * stride_sn, mask=mask, other=0.0)
            for i in gl.static_range(KINDS):
                if is_kind(rows, i):
                    stage, phase = consume_eight_bit_tile(
                        w_smem, x_smem, tail_smem, result_smem,
                        scales_smem[0].index(WHICH), scales_smem[1].index(WHICH), full, empty, stage, phase, num_k,
                        bias, w_scale, x_scale_ptr, stride_xsm,
                        out_ptr, slots_ptr, first, rows, num_slots, topk, column8, columns8,
                        WHICH, 64 << (i // 2), i % 2 == 1, STAGES, EPILOGUE, HAS_BIAS, GATHER,
                    )  # fmt: skip
