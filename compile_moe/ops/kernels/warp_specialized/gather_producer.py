"""Producer whose rows are those of the slots' tokens: every thread copies pieces of them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from compile_moe.ops.kernels.warp_specialized.compat import copy_rows, view
from compile_moe.ops.kernels.warp_specialized.producers import load_weights, tail_start
from compile_moe.ops.kernels.warp_specialized.ring import (
    announce_end,
    announce_tile,
    find_tile,
    next_stage,
    take_tile,
)
from compile_moe.ops.kernels.warp_specialized.scale_ring import (
    copy_step_scales,
    has_two_scales,
    token_scale_ptrs,
    token_slots,
    weight_scale_ptrs,
)


@gluon.jit
def tile_slots(slots_ptr, first, rows, layout: gl.constexpr):
    """Slots of a tile's rows in chunks of 64, and of the tail; beyond the tile, of its last row.

    One row that all programs read for those that there are not would keep the L2 cache from serving others.
    """
    r64 = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    r32 = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
    before, _ = tail_start(rows)
    p = slots_ptr + first
    last = rows - 1
    s0 = gl.load(p + gl.minimum(r64, last), mask=(r64 >= 0) & (rows > 0), other=0)
    s1 = gl.load(p + gl.minimum(64 + r64, last), mask=(r64 >= 0) & (rows > 0), other=0)
    s2 = gl.load(p + gl.minimum(128 + r64, last), mask=(r64 >= 0) & (rows > 0), other=0)
    s3 = gl.load(p + gl.minimum(192 + r64, last), mask=(r64 >= 0) & (rows > 0), other=0)
    st = gl.load(p + gl.minimum(before + r32, last), mask=(r32 >= 0) & (rows > 0), other=0)
    return s0, s1, s2, s3, st


@gluon.jit
def row_offsets(slot, num_slots, row_stride16, topk, STEP: gl.constexpr, layout: gl.constexpr):
    """Offsets of (T, STEP) elements of x, whose rows are row_stride16 times 16 bytes apart."""
    slot = gl.where((slot >= 0) & (slot < num_slots), slot, 0)
    c = gl.arange(0, STEP, layout=gl.SliceLayout(0, layout))
    row_stride = row_stride16.to(gl.int64) * (STEP // 8)
    return gl.expand_dims((slot // topk).to(gl.int64) * row_stride, 1) + gl.expand_dims(c, 0)


@gluon.jit
def tile_offsets(slots, num_slots, row_stride16, topk, STEP: gl.constexpr, layout: gl.constexpr):
    """Of what ``tile_slots`` returns."""
    s0, s1, s2, s3, st = slots
    return (
        row_offsets(s0, num_slots, row_stride16, topk, STEP, layout),
        row_offsets(s1, num_slots, row_stride16, topk, STEP, layout),
        row_offsets(s2, num_slots, row_stride16, topk, STEP, layout),
        row_offsets(s3, num_slots, row_stride16, topk, STEP, layout),
        row_offsets(st, num_slots, row_stride16, topk, STEP, layout),
    )


@gluon.jit
def gather_box(x, ptrs, depth16, k, EVEN_K: gl.constexpr, layout: gl.constexpr):
    if EVEN_K:
        copy_rows(x, ptrs, cache_modifier=".cg")
    else:
        STEP: gl.constexpr = x.shape[1]
        c = gl.arange(0, STEP, layout=gl.SliceLayout(0, layout))
        mask = gl.expand_dims(k * 8 + c // (STEP // 8) < depth16, 0)
        copy_rows(x, ptrs, mask=mask, cache_modifier=".cg")


@gluon.jit
def gather_rows(
    x_smem,
    tail_smem,
    stage,
    base,
    offsets,
    rows,
    depth16,
    k,
    STAGES: gl.constexpr,
    EVEN_K: gl.constexpr,
    TAILS: gl.constexpr,
    layout: gl.constexpr,
):
    """Step k of a tile's rows, which lie at ``tile_offsets`` from base, into the ring."""
    o0, o1, o2, o3, ot = offsets
    if TAILS:
        before, has_tail = tail_start(rows)
        whole = gl.where(has_tail, before, rows)
    else:
        whole = rows
    BOXES: gl.constexpr = x_smem.shape[0] // (2 * STAGES)  # of 64 rows
    x64 = view(x_smem, [STAGES * BOXES, 64, x_smem.shape[2]], x_smem.layout)
    gather_box(x64.index(BOXES * stage), base + o0, depth16, k, EVEN_K, layout)
    if BOXES > 1:
        if whole > 64:
            gather_box(x64.index(BOXES * stage + 1), base + o1, depth16, k, EVEN_K, layout)
    if BOXES == 4:
        if whole > 128:
            gather_box(x64.index(4 * stage + 2), base + o2, depth16, k, EVEN_K, layout)
        if whole > 192:
            gather_box(x64.index(4 * stage + 3), base + o3, depth16, k, EVEN_K, layout)
    if TAILS:
        if has_tail:
            gather_box(tail_smem.index(stage), base + ot, depth16, k, EVEN_K, layout)


@gluon.jit
def producer_gather(
    w_desc,
    x_ptr,
    slots_ptr,
    w_smem,
    x_smem,
    tail_smem,
    tile_smem,
    full,
    empty,
    tiles_ptr,
    num_slots,
    num_n,
    num_k,
    row_stride16,
    depth16,
    topk,
    scales,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    EVEN_K: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
):
    """Fill the ring with rows of the slots' tokens, and that of ``scales`` as ``producer_tma`` does."""
    num_row_tiles = gl.load(tiles_ptr)
    num_tiles = num_row_tiles * num_n
    STEP: gl.constexpr = x_smem.shape[2]
    TWO: gl.constexpr = has_two_scales(EPILOGUE, INTERLEAVED)
    W_BYTES: gl.constexpr = (
        w_smem.shape[0] // STAGES * 64 * w_smem.shape[2] * w_smem.dtype.primitive_bitwidth // 8
    )
    # 16 bytes a thread.
    layout: gl.constexpr = gl.BlockedLayout([1, STEP // 8], [4, 8], [4, 1], [1, 0])
    stage = 0
    phase = 0
    # Loads for the next tile, and for the one after it what they depend on, before this tile's.
    tile = gl.program_id(0)
    e1, f1, r1, n1 = find_tile(tiles_ptr, tile, num_row_tiles, num_n)
    s0, s1, s2, s3, st = tile_slots(slots_ptr, f1, r1, layout)
    if BLOCK_ROWS:
        scale_slots = token_slots(slots_ptr, f1, r1)
    next_tile = tile + gl.num_programs(0)
    e2, f2, r2, n2 = find_tile(tiles_ptr, next_tile, num_row_tiles, num_n)
    while tile < num_tiles:
        slots = s0, s1, s2, s3, st
        offsets = tile_offsets(slots, num_slots, row_stride16, topk, STEP, layout)
        expert, first, rows, tile_n = e1, f1, r1, n1
        s0, s1, s2, s3, st = tile_slots(slots_ptr, f2, r2, layout)
        if BLOCK_ROWS:
            ptrs = token_scale_ptrs(scales, scale_slots, num_slots, topk)
            scale_slots = token_slots(slots_ptr, f2, r2)
            w_ptrs = weight_scale_ptrs(scales, expert, tile_n, TWO, BLOCK_ROWS)
        # Sums, because Triton doesn't see that ``e1 = e2`` changes from one iteration to the next.
        e1, f1, r1, n1 = e2 + 0, f2 + 0, r2 + 0, n2 + 0
        tile = next_tile + 0
        next_tile = take_tile(tiles_ptr)
        e2, f2, r2, n2 = find_tile(tiles_ptr, next_tile, num_row_tiles, num_n)
        # As the first step does once more.
        mbarrier.wait(empty.index(stage), phase ^ 1)
        announce_tile(tile_smem, stage, (expert, first, rows, tile_n))
        for k in range(num_k):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, W_BYTES)
            load_weights(w_desc, w_smem, bar, stage, expert, tile_n, k * w_smem.shape[2], EPILOGUE, STAGES)
            gather_rows(
                x_smem, tail_smem, stage, x_ptr + k * STEP, offsets, rows, depth16, k,
                STAGES, EVEN_K, not BLOCK_ROWS, layout,
            )  # fmt: skip
            if BLOCK_ROWS:
                copy_step_scales(scales, stage, k, ptrs, w_ptrs, TWO)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    announce_end(tile_smem, full, stage, True)
