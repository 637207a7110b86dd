"""Producers of tokens as the others, and of weights that are stored in fewer bits and decoded on their way."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from compile_moe.ops.kernels.warp_specialized.decode_weights import decode_step, group_ptrs, load_groups
from compile_moe.ops.kernels.warp_specialized.gather_producer import gather_rows, tile_offsets, tile_slots
from compile_moe.ops.kernels.warp_specialized.ring import find_tile, next_stage
from compile_moe.ops.kernels.warp_specialized.row_producer import copy_few_rows, copy_many_rows
from compile_moe.ops.kernels.warp_specialized.stored_weights import request, step_behind


@gluon.jit
def decoding_producer(
    x,  # by pointers (GEMM 1): the tokens', rows' stride, depth, topk; by TMA (GEMM 2): descriptors of 32 and 256 rows
    slots_ptr,
    w_desc,
    stored,
    scales,  # pointer, strides of experts, rows and groups
    zeros,
    num_groups,
    w_smem,
    x_smem,
    tail_smem,
    full,
    empty,
    tiles_ptr,
    num_slots,
    num_n,
    num_k,
    columns8,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    EVEN_K: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    GATHER: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    PACKED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    WHICH: gl.constexpr,
    DECODERS: gl.constexpr,
):
    """Fill the ring with rows, and with weights from the ring of those as they are stored, which runs ahead of it.

    Args:
        WHICH: of so many decoders, who take the program's steps in turn. Each has a ring of stored weights of its own.
    """
    num_row_tiles = gl.load(tiles_ptr)
    num_tiles = num_row_tiles * num_n
    STEP: gl.constexpr = x_smem.shape[2]
    smem, stored_full = stored
    SLOTS: gl.constexpr = smem.shape[0]
    HAS_MANY: gl.constexpr = x_smem.shape[0] == 8 * STAGES  # room for more than 160 rows
    step = gl.num_programs(0)
    layout: gl.constexpr = gl.BlockedLayout([1, STEP // 8], [4, 8], [4, 1], [1, 0])
    # Of the loads that run ahead: tile and step, and where the tile behind it is.
    ta = gl.program_id(0)
    ka = 0
    ea, _, _, na = find_tile(tiles_ptr, ta, num_row_tiles, num_n)
    eb, _, _, nb = find_tile(tiles_ptr, ta + step, num_row_tiles, num_n)
    for _ in gl.static_range(WHICH):
        ta, ka, ea, na, eb, nb = step_behind(ta, ka, ea, na, eb, nb, tiles_ptr, num_row_tiles, num_n, num_k)
    for i in gl.static_range(SLOTS):
        request(stored, w_desc, i, ta, ka, ea, na, num_tiles, EPILOGUE)
        for _ in gl.static_range(DECODERS):
            ta, ka, ea, na, eb, nb = step_behind(
                ta, ka, ea, na, eb, nb, tiles_ptr, num_row_tiles, num_n, num_k
            )
    slot = 0
    slot_phase = 0
    stage = WHICH
    phase = 0
    first_k = WHICH  # of a tile
    e1, f1, r1, n1 = find_tile(tiles_ptr, gl.program_id(0), num_row_tiles, num_n)
    if GATHER:
        s0, s1, s2, s3, st = tile_slots(slots_ptr, f1, r1, layout)
    for tile in range(gl.program_id(0), num_tiles, step):
        if GATHER:
            x_ptr, row_stride16, depth16, topk = x
            slots = s0, s1, s2, s3, st
            offsets = tile_offsets(slots, num_slots, row_stride16, topk, STEP, layout)
        expert, first, rows, tile_n = e1, f1, r1, n1
        if GROUP:
            scale_ptrs, zero_ptrs, mask, zero_row = group_ptrs(
                scales, zeros, expert, tile_n, columns8, EPILOGUE, INTERLEAVED, PACKED_ZEROS
            )
            scale_codes = load_groups(scale_ptrs, mask, scales[3], first_k, num_groups, GROUP)
            if HAS_ZERO:
                zero_codes = load_groups(zero_ptrs, mask, zeros[3], first_k, num_groups, GROUP)
        e1, f1, r1, n1 = find_tile(tiles_ptr, tile + step, num_row_tiles, num_n)
        if GATHER:
            s0, s1, s2, s3, st = tile_slots(slots_ptr, f1, r1, layout)
        for k in range(first_k, num_k, DECODERS):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            bar = full.index(stage)
            if GATHER:
                gather_rows(
                    x_smem, tail_smem, stage, x_ptr + k * STEP, offsets, rows, depth16, k,
                    STAGES, EVEN_K, layout,
                )  # fmt: skip
                async_copy.mbarrier_arrive(bar, increment_count=False)
            elif HAS_MANY:
                if rows > 160:
                    copy_many_rows(
                        x[0], x[1], x_smem, tail_smem, bar, stage, first, rows, k * STEP, STAGES, 0
                    )
                else:
                    copy_few_rows(x[0], x_smem, tail_smem, bar, stage, first, rows, k * STEP, 0)
            else:
                copy_few_rows(x[0], x_smem, tail_smem, bar, stage, first, rows, k * STEP, 0)
            scale = None
            zero = None
            row = None
            if GROUP:
                scale = scale_codes
                if HAS_ZERO:
                    zero = zero_codes
                    row = zero_row
            mbarrier.wait(stored_full.index(slot), slot_phase)
            decode_step(smem, slot, w_smem, stage, scale, zero, row, PACKED, PACKED_ZEROS, STAGES)
            mbarrier.arrive(bar, count=1)
            if GROUP:
                # Those of the next step, behind the fence, which waits for loads.
                scale_codes = load_groups(scale_ptrs, mask, scales[3], k + DECODERS, num_groups, GROUP)
                if HAS_ZERO:
                    zero_codes = load_groups(zero_ptrs, mask, zeros[3], k + DECODERS, num_groups, GROUP)
            request(stored, w_desc, slot, ta, ka, ea, na, num_tiles, EPILOGUE)
            for _ in gl.static_range(DECODERS):
                ta, ka, ea, na, eb, nb = step_behind(
                    ta, ka, ea, na, eb, nb, tiles_ptr, num_row_tiles, num_n, num_k
                )
                stage, phase = next_stage(stage, phase, STAGES)
            slot, slot_phase = next_stage(slot, slot_phase, SLOTS)
        first_k = (first_k + num_k) % DECODERS  # of at most two
