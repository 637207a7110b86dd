"""Consumers: warpgroups that multiply what the ring brings, and store the result."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from compile_moe.ops.kernels.warp_specialized.compat import appended, warps_barrier
from compile_moe.ops.kernels.warp_specialized.decoding_products import multiply_decoded
from compile_moe.ops.kernels.warp_specialized.products import start_products, wait_for_products, zero_sums
from compile_moe.ops.kernels.warp_specialized.ring import announced_tile, next_stage
from compile_moe.ops.kernels.warp_specialized.store import result_columns, row_slots, store_tile
from compile_moe.ops.kernels.warp_specialized.weight_rows import weight_rows


@gluon.jit
def consume_tile(
    w_smem,
    x_smem,
    tail_smem,
    result_smem,
    full,
    empty,
    stage,
    phase,
    num_k,
    bias_ptr,
    stride_bn,
    row_scales,
    stored,
    expert,
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
    INTERLEAVED: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_ROW_SCALE: gl.constexpr,
    PACKED: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
):
    """One consumer's 64 or 128 weight rows times MAIN + TAIL tokens of a tile, whose first stage is full."""
    PARTS: gl.constexpr = w_smem.shape[0] // (2 * STAGES)
    WIDTH8: gl.constexpr = result_columns(EPILOGUE) // 8
    sums = zero_sums(MAIN, PARTS)
    if PACKED > 0:
        gl.static_assert(PARTS == 1)
        acc, tail = sums[0]
        acc, tail, w, stage, phase = multiply_decoded(
            w_smem, x_smem, tail_smem, full, empty, stage, phase, num_k, acc, tail, stored, expert, column8, columns8,
            WHICH, STAGES, EPILOGUE, INTERLEAVED, GATHER, TAIL, PACKED, GROUP, HAS_ZERO, PACKED_ZEROS,
        )  # fmt: skip
    else:
        sums = start_products(
            w_smem, x_smem, tail_smem, stage, sums, True, WHICH, TAIL, STAGES, GATHER, TRANSPOSED
        )
        stage, phase = next_stage(stage, phase, STAGES)
        for _ in range(1, num_k):
            mbarrier.wait(full.index(stage), phase)
            sums = start_products(
                w_smem, x_smem, tail_smem, stage, sums, False, WHICH, TAIL, STAGES, GATHER, TRANSPOSED
            )
            # The previous stage's products are done in each warp.
            warps_barrier()
            # Not a variable carried from the iteration before: Triton doesn't see that ``last = stage`` changes.
            mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
    # Loads that the last products hide.
    bias = load_bias(bias_ptr, stride_bn, column8, columns8, EPILOGUE, HAS_BIAS, INTERLEAVED)
    if PARTS == 2:
        bias1 = load_bias(bias_ptr, stride_bn, column8 + WIDTH8, columns8, EPILOGUE, HAS_BIAS, INTERLEAVED)
    scale = None
    if HAS_ROW_SCALE:
        gl.static_assert(PARTS == 1)
        scale = load_row_scale(row_scales, expert, column8, columns8, EPILOGUE, INTERLEAVED)
    slots = ()
    for i in gl.static_range(MAIN // 64):
        here = row_slots(slots_ptr, first + 64 * i, rows - 64 * i, num_slots, 64, EPILOGUE)
        slots = appended(slots, here)
    if TAIL:
        slots = appended(slots, row_slots(slots_ptr, first + MAIN, rows - MAIN, num_slots, 32, EPILOGUE))
    if PACKED > 0:
        # Registers of products under way, which must not change before.
        acc, tail, _ = warpgroup_mma_wait(0, deps=(acc, tail, w))
        sums = ((acc, tail),)
    else:
        sums = wait_for_products(sums, 0, TAIL)
    warps_barrier()
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
    store_tile(sums[0], bias, scale, result_smem, out_ptr, slots, rows, column8, columns8, EPILOGUE, HAS_BIAS)
    if PARTS == 2:
        column8 += WIDTH8
        store_tile(
            sums[1], bias1, None, result_smem, out_ptr, slots, rows, column8, columns8, EPILOGUE, HAS_BIAS
        )
    return stage, phase


@gluon.jit
def is_kind(rows, KIND: gl.constexpr, TAILS: gl.constexpr = True):
    """Whether a tile of so many rows has 64, 64 + a tail, 128, 128 + a tail, 256 or 256 + a tail; without TAILS kinds
    are even. What stands behind the last tile, of -1 rows, is of no kind.
    """
    MAIN: gl.constexpr = 64 << (KIND // 2)
    if KIND % 2 == 1:
        return (rows > MAIN) & (rows <= MAIN + 32)
    elif KIND == 0:
        return (rows >= 0) & (rows <= MAIN)
    else:
        return (rows > MAIN // 2 + (32 if TAILS else 0)) & (rows <= MAIN)


@gluon.jit
def load_bias(
    bias_ptr,
    stride_bn,
    column8,
    columns8,
    EPILOGUE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    INTERLEAVED: gl.constexpr,
):
    layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    if HAS_BIAS:
        column, mask = weight_rows(column8, columns8, EPILOGUE, INTERLEAVED, layout)
        bias = gl.load(bias_ptr + column * stride_bn, mask=mask, other=0.0).to(gl.float32)
    else:
        bias = gl.zeros([64], gl.float32, layout)
    return bias


@gluon.jit
def load_row_scale(row_scales, expert, column8, columns8, EPILOGUE: gl.constexpr, INTERLEAVED: gl.constexpr):
    """Of a consumer's 64 weight rows, float32."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    row, mask = weight_rows(column8, columns8, EPILOGUE, INTERLEAVED, layout)
    ptr, stride_e, stride_n = row_scales
    offsets = expert.to(gl.int64) * stride_e + row.to(gl.int64) * stride_n
    return gl.load(ptr + offsets, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def consumer(
    w_smem,
    x_smem,
    tail_smem,
    result_smem,
    tile_smem,
    full,
    empty,
    out_ptr,
    bias_ptr,
    slots_ptr,
    num_slots,
    num_k,
    columns8,
    stride_be,
    stride_bn,
    row_scales,  # of weights, and the strides of experts and rows; read where HAS_ROW_SCALE
    stored,  # of weights that are decoded: scales and zero points, as group_ptrs takes them, and how many groups
    WHICH: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_ROW_SCALE: gl.constexpr,
    PACKED: gl.constexpr = 0,
    GROUP: gl.constexpr = 0,
    HAS_ZERO: gl.constexpr = False,
    PACKED_ZEROS: gl.constexpr = 1,
):
    """Every tile of this program: 64 or 128 rows of weights (of gate and up together, where gated) for each consumer.

    Args:
        PACKED: weights that an element of the ring holds, which are decoded; 0 for those multiplied as they are.
        GROUP: columns that share a scale; 0 where rows have one, or none.
    """
    stage = 0
    phase = 0
    result_smem = result_smem.index(WHICH)
    WIDTH8: gl.constexpr = result_columns(EPILOGUE) // 8
    PARTS: gl.constexpr = w_smem.shape[0] // (2 * STAGES)
    # 64, 128 or 256 tokens, without and with a tail, of which a smaller ring has the first ones.
    BOXES: gl.constexpr = x_smem.shape[0] // STAGES
    KINDS: gl.constexpr = 6 if BOXES == 8 else 4 if BOXES == 4 else 2
    rows = 0
    while rows >= 0:
        mbarrier.wait(full.index(stage), phase)
        expert, first, rows, tile_n = announced_tile(tile_smem, stage)
        column8 = (2 * tile_n + WHICH) * PARTS * WIDTH8
        biases = bias_ptr + expert.to(gl.int64) * stride_be
        for i in gl.static_range(KINDS):
            if is_kind(rows, i):
                stage, phase = consume_tile(
                    w_smem, x_smem, tail_smem, result_smem, full, empty, stage, phase, num_k,
                    biases, stride_bn, row_scales, stored, expert, out_ptr, slots_ptr, first, rows, num_slots,
                    column8, columns8, WHICH, 64 << (i // 2), i % 2 == 1, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED,
                    GATHER, TRANSPOSED, HAS_ROW_SCALE, PACKED, GROUP, HAS_ZERO, PACKED_ZEROS,
                )  # fmt: skip
