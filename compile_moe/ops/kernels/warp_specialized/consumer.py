"""Consumers: warpgroups that multiply what the ring brings, and store the result."""

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
from compile_moe.ops.kernels.warp_specialized.decoding_products import multiply_decoded
from compile_moe.ops.kernels.warp_specialized.ring import announced_tile, next_stage
from compile_moe.ops.kernels.warp_specialized.store import halves, result_columns, row_slots, store_chunk
from compile_moe.ops.kernels.warp_specialized.weight_rows import weight_rows


@gluon.jit
def start_products(
    w_smem,
    x_smem,
    tail_smem,
    stage,
    acc,
    tail,
    IS_FIRST: gl.constexpr,
    WHICH: gl.constexpr,
    TAIL: gl.constexpr,
    STAGES: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Of a step, added to acc and tail or, of the first step, in their place; those of the step before are done."""
    MAIN: gl.constexpr = acc.shape[1]
    BOXES: gl.constexpr = x_smem.shape[0] // STAGES * 32 // MAIN  # of a stage
    if GATHER:
        # cp.async wrote x through the generic proxy.
        fence_async_shared()
    w = w_smem.index(2 * stage + WHICH)
    if TRANSPOSED:
        w = w.permute((1, 0))
    x = view(x_smem, [STAGES * BOXES, MAIN, 64], x_smem.layout).index(stage * BOXES)
    acc = warpgroup_mma(w, x.permute((1, 0)), acc, use_acc=not IS_FIRST, is_async=True)
    if TAIL:
        rest = tail_smem.index(stage)
        tail = warpgroup_mma(w, rest.permute((1, 0)), tail, use_acc=not IS_FIRST, is_async=True)
        acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))
    else:
        acc = warpgroup_mma_wait(1, deps=(acc,))
    return acc, tail


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
    """One consumer's 64 weight rows times MAIN + TAIL tokens of a tile, whose first stage is full."""
    main_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    acc = gl.zeros([64, MAIN], gl.float32, main_layout)
    tail = gl.zeros([64, 32], gl.float32, tail_layout)
    if PACKED > 0:
        acc, tail, w, stage, phase = multiply_decoded(
            w_smem, x_smem, tail_smem, full, empty, stage, phase, num_k, acc, tail, stored, expert, column8, columns8,
            WHICH, STAGES, EPILOGUE, INTERLEAVED, GATHER, TAIL, PACKED, GROUP, HAS_ZERO, PACKED_ZEROS,
        )  # fmt: skip
    else:
        acc, tail = start_products(
            w_smem, x_smem, tail_smem, stage, acc, tail, True, WHICH, TAIL, STAGES, GATHER, TRANSPOSED
        )
        stage, phase = next_stage(stage, phase, STAGES)
        for _ in range(1, num_k):
            mbarrier.wait(full.index(stage), phase)
            acc, tail = start_products(
                w_smem, x_smem, tail_smem, stage, acc, tail, False, WHICH, TAIL, STAGES, GATHER, TRANSPOSED
            )
            # The previous stage's products are done in each warp.
            warps_barrier()
            # Not a variable carried from the iteration before: Triton doesn't see that ``last = stage`` changes.
            mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
    # Loads that the last products hide.
    bias = load_bias(bias_ptr, stride_bn, column8, columns8, EPILOGUE, HAS_BIAS, INTERLEAVED)
    scale = None
    if HAS_ROW_SCALE:
        scale = load_row_scale(row_scales, expert, column8, columns8, EPILOGUE, INTERLEAVED)
    s0 = row_slots(slots_ptr, first, rows, num_slots, 64, EPILOGUE)
    if MAIN >= 128:
        s1 = row_slots(slots_ptr, first + 64, rows - 64, num_slots, 64, EPILOGUE)
    if MAIN == 256:
        s2 = row_slots(slots_ptr, first + 128, rows - 128, num_slots, 64, EPILOGUE)
        s3 = row_slots(slots_ptr, first + 192, rows - 192, num_slots, 64, EPILOGUE)
    if TAIL:
        st = row_slots(slots_ptr, first + MAIN, rows - MAIN, num_slots, 32, EPILOGUE)
    if PACKED > 0:
        # Registers of products under way, which must not change before.
        acc, tail, _ = warpgroup_mma_wait(0, deps=(acc, tail, w))
    elif TAIL:
        acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    warps_barrier()
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)

    if MAIN == 256:
        left, right = halves(acc, 64, 128)
        a0, a1 = halves(left, 64, 64)
        a2, a3 = halves(right, 64, 64)
    elif MAIN == 128:
        a0, a1 = halves(acc, 64, 64)
    else:
        a0 = acc
    a0 = times_rows(a0, scale)
    store_chunk(a0, bias, result_smem, out_ptr, s0, rows, column8, columns8, EPILOGUE, HAS_BIAS, 64)
    if MAIN >= 128:
        a1 = times_rows(a1, scale)
        store_chunk(a1, bias, result_smem, out_ptr, s1, rows - 64, column8, columns8, EPILOGUE, HAS_BIAS, 64)
    if MAIN == 256:
        a2 = times_rows(a2, scale)
        a3 = times_rows(a3, scale)
        store_chunk(a2, bias, result_smem, out_ptr, s2, rows - 128, column8, columns8, EPILOGUE, HAS_BIAS, 64)
        store_chunk(a3, bias, result_smem, out_ptr, s3, rows - 192, column8, columns8, EPILOGUE, HAS_BIAS, 64)
    if TAIL:
        tail = times_rows(tail, scale)
        store_chunk(
            tail, bias, result_smem, out_ptr, st, rows - MAIN, column8, columns8, EPILOGUE, HAS_BIAS, 32
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
def times_rows(acc, scale):
    """Sums times the scales of their weight rows, if these have some."""
    if scale is not None:
        acc = acc * gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc


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
    """Every tile of this program: columns 64 (of gate and up together, where gated) for each consumer.

    Args:
        PACKED: weights that an element of the ring holds, which are decoded; 0 for those multiplied as they are.
        GROUP: columns that share a scale; 0 where rows have one, or none.
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
        column8 = (2 * tile_n + WHICH) * WIDTH8
        biases = bias_ptr + expert.to(gl.int64) * stride_be
        for i in gl.static_range(KINDS):
            if is_kind(rows, i):
                stage, phase = consume_tile(
                    w_smem, x_smem, tail_smem, result_smem, full, empty, stage, phase, num_k,
                    biases, stride_bn, row_scales, stored, expert, out_ptr, slots_ptr, first, rows, num_slots,
                    column8, columns8, WHICH, 64 << (i // 2), i % 2 == 1, STAGES, EPILOGUE, HAS_BIAS, INTERLEAVED,
                    GATHER, TRANSPOSED, HAS_ROW_SCALE, PACKED, GROUP, HAS_ZERO, PACKED_ZEROS,
                )  # fmt: skip
