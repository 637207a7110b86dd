"""A consumer's tile of 8-bit floating point with a scale for each group of 128 columns, which is a step of the ring.

float32 adds the sums of a step times their scales, which lie in a ring beside the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from compile_moe.ops.kernels.warp_specialized.compat import view, warps_barrier
from compile_moe.ops.kernels.warp_specialized.ring import next_stage
from compile_moe.ops.kernels.warp_specialized.store import halves, row_slots, store_chunk


@gluon.jit
def step_sums(w, x, T: gl.constexpr, layout: gl.constexpr):
    zeros = gl.zeros([64, T], gl.float32, layout)
    return warpgroup_mma(w, x.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def add_products(w, x, acc):
    return warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)


@gluon.jit
def add_scaled(acc, sums, w_scale, scales_smem):
    """acc plus (64, T) sums of a step times the scales of their weight rows and tokens."""
    layout: gl.constexpr = acc.type.layout
    sums = warpgroup_mma_wait(0, deps=(sums,))
    x_scale = scales_smem.load(gl.SliceLayout(0, layout))
    w_scale = gl.convert_layout(w_scale, gl.SliceLayout(1, layout), assert_trivial=True)
    scale = gl.expand_dims(w_scale, 1) * gl.expand_dims(x_scale, 0)
    # acc + sums * scale, here and now: LLVM would add behind the next products, without the registers for both.
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [sums, scale, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def chunk_of(acc0, acc1, acc2, acc3, I: gl.constexpr, PART: gl.constexpr):
    """Columns 64 * I.. of a tile's sums, PART of them (at most 128, if more than 64) in each of the accumulators."""
    if PART == 64:
        if I == 0:
            chunk = acc0
        elif I == 1:
            chunk = acc1
        elif I == 2:
            chunk = acc2
        else:
            chunk = acc3
    else:
        if I < 2:
            left, right = halves(acc0, 64, 64)
        else:
            left, right = halves(acc1, 64, 64)
        if I % 2 == 0:
            chunk = left
        else:
            chunk = right
    return chunk


@gluon.jit
def store_sums(
    acc,
    bias,
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
    T: gl.constexpr,
):
    if rows > 0:
        slot = row_slots(slots_ptr, first, rows, num_slots, T, EPILOGUE)
        store_chunk(acc, bias, result_smem, out_ptr, slot, rows, column8, columns8, EPILOGUE, HAS_BIAS, T)


@gluon.jit
def consume_group_tile(
    w_smem,
    x_smem,
    tail_smem,
    result_smem,
    scales,
    full,
    empty,
    stage,
    phase,
    num_k,
    bias,
    out_ptr,
    slots_ptr,
    first,
    rows,
    num_slots,
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
    # Sums of a step beside those of all steps, and scales: as many columns at a time as there are registers for.
    ROWS: gl.constexpr = x_smem.shape[0] // STAGES * 32
    PART: gl.constexpr = MAIN if MAIN < 128 else (64 if TAIL and MAIN == 256 else 128)
    PARTS: gl.constexpr = MAIN // PART
    STEP: gl.constexpr = x_smem.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 32])
    scales_smem, tail_scales_smem, w_scales_smem = scales
    acc0 = gl.zeros([64, PART], gl.float32, layout)
    if PARTS > 1:
        acc1 = gl.zeros([64, PART], gl.float32, layout)
    else:
        acc1 = 0
    if PARTS > 2:
        acc2 = gl.zeros([64, PART], gl.float32, layout)
        acc3 = gl.zeros([64, PART], gl.float32, layout)
    else:
        acc2 = 0
        acc3 = 0
    if TAIL:
        tail = gl.zeros([64, 32], gl.float32, tail_layout)
    else:
        tail = 0
    boxes = view(x_smem, [STAGES * (ROWS // PART), PART, STEP], x_smem.layout)
    for _ in range(num_k):
        mbarrier.wait(full.index(stage), phase)
        if GATHER:
            # cp.async wrote x through the generic proxy.
            fence_async_shared()
        w = w_smem.index(2 * stage + WHICH)
        box = stage * (ROWS // PART)
        x_scales = scales_smem.index(stage)
        w_scale = w_scales_smem.index(stage).slice(64 * WHICH, 64).load(gl.SliceLayout(1, layout))
        if TAIL:
            sums = step_sums(w, tail_smem.index(stage), 32, tail_layout)
            tail = add_scaled(tail, sums, w_scale, tail_scales_smem.index(stage))
        sums = step_sums(w, boxes.index(box), PART, layout)
        acc0 = add_scaled(acc0, sums, w_scale, x_scales.slice(0, PART))
        if PARTS > 1:
            sums = step_sums(w, boxes.index(box + 1), PART, layout)
            acc1 = add_scaled(acc1, sums, w_scale, x_scales.slice(PART, PART))
        if PARTS > 2:
            sums = step_sums(w, boxes.index(box + 2), PART, layout)
            acc2 = add_scaled(acc2, sums, w_scale, x_scales.slice(2 * PART, PART))
            sums = step_sums(w, boxes.index(box + 3), PART, layout)
            acc3 = add_scaled(acc3, sums, w_scale, x_scales.slice(3 * PART, PART))
        # Products are done, and scales read, in each warp.
        warps_barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    for i in gl.static_range(MAIN // 64):
        chunk = chunk_of(acc0, acc1, acc2, acc3, i, PART)
        if EPILOGUE == "gated":
            store_sums(
                chunk, bias, result_smem, out_ptr, slots_ptr, first + 64 * i, rows - 64 * i, num_slots,
                column8, columns8, EPILOGUE, HAS_BIAS, 64,
            )  # fmt: skip
        else:
            # The result of 64 tokens doesn't fit the buffer.
            left, right = halves(chunk, 64, 32)
            store_sums(
                left, bias, result_smem, out_ptr, slots_ptr, first + 64 * i, rows - 64 * i, num_slots,
                column8, columns8, EPILOGUE, HAS_BIAS, 32,
            )  # fmt: skip
            store_sums(
                right, bias, result_smem, out_ptr, slots_ptr, first + 64 * i + 32, rows - 64 * i - 32, num_slots,
                column8, columns8, EPILOGUE, HAS_BIAS, 32,
            )  # fmt: skip
    if TAIL:
        store_sums(
            tail, bias, result_smem, out_ptr, slots_ptr, first + MAIN, rows - MAIN, num_slots,
            column8, columns8, EPILOGUE, HAS_BIAS, 32,
        )  # fmt: skip
    return stage, phase
