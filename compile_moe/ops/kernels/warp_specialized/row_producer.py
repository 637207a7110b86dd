"""Producer whose rows lie in expert order: the memory accelerator brings boxes of them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from compile_moe.ops.kernels.warp_specialized.compat import copy_box, view
from compile_moe.ops.kernels.warp_specialized.producers import load_weights
from compile_moe.ops.kernels.warp_specialized.ring import (
    STEP_BYTES,
    announce_end,
    announce_tile,
    find_tile,
    next_stage,
    take_tile,
)
from compile_moe.ops.kernels.warp_specialized.scale_ring import (
    copy_step_scales,
    row_scale_ptrs,
    weight_scale_ptrs,
)

BOX_BYTES = gl.constexpr(32 * STEP_BYTES.value)  # of 32 rows


@gluon.jit
def copy_many_rows(
    x_desc,
    x256_desc,
    x_smem,
    tail_smem,
    bar,
    stage,
    first,
    rows,
    k,
    STAGES: gl.constexpr,
    TAILS: gl.constexpr,
    MORE_BYTES: gl.constexpr,
):
    """Rows of a tile of more than 160, columns k.., into the ring; the barrier also expects MORE_BYTES."""
    x256 = view(x_smem, [STAGES, 256, x_smem.shape[2]], x_smem.layout)
    if TAILS and rows > 256:
        mbarrier.expect(bar, MORE_BYTES + 9 * BOX_BYTES)
        copy_box(x_desc, [first + 256, k], bar, tail_smem.index(stage))
    else:
        mbarrier.expect(bar, MORE_BYTES + 8 * BOX_BYTES)
    copy_box(x256_desc, [first, k], bar, x256.index(stage))


@gluon.jit
def copy_few_rows(
    x_desc,
    x_smem,
    tail_smem,
    bar,
    stage,
    first,
    rows,
    k,
    STAGES: gl.constexpr,
    TAILS: gl.constexpr,
    MORE_BYTES: gl.constexpr,
):
    """Rows of a tile of up to 160, columns k.., into the ring; the barrier also expects MORE_BYTES."""
    boxes = (rows + 31) // 32
    BOXES: gl.constexpr = x_smem.shape[0] // STAGES  # of a stage
    # Every call costs a barrier of the warps, also one whose predicate is false.
    for i in gl.static_range(5 if BOXES > 3 else 3):
        if boxes == i + 1:
            mbarrier.expect(bar, MORE_BYTES + (i + 1) * BOX_BYTES)
            for j in gl.static_range(i + 1):
                # A tail lies in a buffer of its own, also behind 64 or 128 rows.
                if TAILS and j == i and (i == 2 or i == 4):
                    box = tail_smem.index(stage)
                else:
                    box = x_smem.index(BOXES * stage + j)
                copy_box(x_desc, [first + 32 * j, k], bar, box)


@gluon.jit
def fill(
    ring,
    descriptors,
    stage,
    phase,
    tile,
    num_k,
    scales,
    scale_ptrs,
    MANY: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
):
    """Every step of a tile, of more than 160 rows where MANY. Returns the stage and phase behind them."""
    w_smem, x_smem, tail_smem, tile_smem, full, empty = ring
    w_desc, x_desc, x256_desc = descriptors
    expert, first, rows, tile_n = tile
    STEP: gl.constexpr = x_smem.shape[2]
    W_BYTES: gl.constexpr = (
        w_smem.shape[0] // STAGES * 64 * w_smem.shape[2] * w_smem.dtype.primitive_bitwidth // 8
    )
    # As the first step does once more.
    mbarrier.wait(empty.index(stage), phase ^ 1)
    announce_tile(tile_smem, stage, tile)
    for k in range(num_k):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        bar = full.index(stage)
        if MANY:
            copy_many_rows(
                x_desc, x256_desc, x_smem, tail_smem, bar, stage, first, rows, k * STEP,
                STAGES, not BLOCK_ROWS, W_BYTES,
            )  # fmt: skip
        else:
            copy_few_rows(
                x_desc, x_smem, tail_smem, bar, stage, first, rows, k * STEP, STAGES, not BLOCK_ROWS, W_BYTES
            )
        load_weights(w_desc, w_smem, bar, stage, expert, tile_n, k * w_smem.shape[2], EPILOGUE, STAGES)
        if BLOCK_ROWS:
            ptrs, w_ptrs = scale_ptrs
            copy_step_scales(scales, stage, k, ptrs, w_ptrs, False)
            async_copy.mbarrier_arrive(bar, increment_count=False)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def producer_tma(
    w_desc,
    x_desc,
    x256_desc,
    w_smem,
    x_smem,
    tail_smem,
    tile_smem,
    full,
    empty,
    tiles_ptr,
    num_n,
    num_k,
    scales,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
):
    """Fill the ring with rows in expert order, and that of ``scales`` where BLOCK_ROWS of the weights share one."""
    num_row_tiles = gl.load(tiles_ptr)
    num_tiles = num_row_tiles * num_n
    HAS_MANY: gl.constexpr = x_smem.shape[0] == 8 * STAGES  # room for more than 160 rows
    ring = w_smem, x_smem, tail_smem, tile_smem, full, empty
    descriptors = w_desc, x_desc, x256_desc
    stage = 0
    phase = 0
    tile = gl.program_id(0)
    next_tile = tile + gl.num_programs(0)
    e1, f1, r1, n1 = find_tile(tiles_ptr, tile, num_row_tiles, num_n)
    while tile < num_tiles:
        expert, first, rows, tile_n = e1, f1, r1, n1
        e1, f1, r1, n1 = find_tile(tiles_ptr, next_tile, num_row_tiles, num_n)
        tile = next_tile + 0
        next_tile = take_tile(tiles_ptr)
        this = expert, first, rows, tile_n
        if BLOCK_ROWS:
            ptrs = row_scale_ptrs(scales, first, rows)
            scale_ptrs = ptrs, weight_scale_ptrs(scales, expert, tile_n, False, BLOCK_ROWS)
        else:
            scale_ptrs = None
        if HAS_MANY:
            if rows > 160:
                stage, phase = fill(
                    ring, descriptors, stage, phase, this, num_k, scales, scale_ptrs,
                    True, STAGES, EPILOGUE, BLOCK_ROWS,
                )  # fmt: skip
            else:
                stage, phase = fill(
                    ring, descriptors, stage, phase, this, num_k, scales, scale_ptrs,
                    False, STAGES, EPILOGUE, BLOCK_ROWS,
                )  # fmt: skip
        else:
            stage, phase = fill(
                ring, descriptors, stage, phase, this, num_k, scales, scale_ptrs,
                False, STAGES, EPILOGUE, BLOCK_ROWS,
            )  # fmt: skip
    mbarrier.wait(empty.index(stage), phase ^ 1)
    announce_end(tile_smem, full, stage, BLOCK_ROWS > 0)
