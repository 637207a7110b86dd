"""A consumer's tile of 8-bit floating point with a scale for each block: the columns of a step, and as many weight rows
as a tile has, or more.

Tokens are the left operand here. So a thread has sums of two tokens for each weight row, and two tokens' scales, where
it would have those of many if they were the right one: shared memory would bring these scales to every warp.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from compile_moe.ops.kernels.epilogue import epilogue
from compile_moe.ops.kernels.warp_specialized.compat import view, warps_barrier
from compile_moe.ops.kernels.warp_specialized.eight_bit_sums import step_sums
from compile_moe.ops.kernels.warp_specialized.ring import next_stage
from compile_moe.ops.kernels.warp_specialized.store import halves, result_columns
from compile_moe.ops.kernels.warp_specialized.weight_rows import weight_rows


@gluon.jit
def by_halves(x):
    """(64, N), in every 16 columns 8 of gate and 8 of up, as (64, N / 16, 8, 2)."""
    return gl.permute(gl.reshape(x, [64, x.shape[1] // 16, 2, 8]), (0, 1, 3, 2))


@gluon.jit
def add_product(acc, sums, scale):
    # Here and now: LLVM would add behind the next products, without the registers for both.
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [sums, scale, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def load_scales(x_smem, w_smem, stage, layout: gl.constexpr, TWO: gl.constexpr):
    """A step's scales, 64 tokens' times the weights': (64,), or (64, 2) of gate and up."""
    x_scale = x_smem.load(gl.SliceLayout(1, layout))
    scale = x_scale * w_smem.index(2 * stage).load(x_scale.type.layout)
    if TWO:
        scale = gl.join(scale, x_scale * w_smem.index(2 * stage + 1).load(x_scale.type.layout))
    return scale


@gluon.jit
def add_scaled(acc, sums, scale, TWO: gl.constexpr):
    """acc plus a step's sums (64, N) times its scales, when the sums are there."""
    layout: gl.constexpr = acc.type.layout
    sums = warpgroup_mma_wait(0, deps=(sums,))
    if TWO:
        acc = by_halves(acc)
        scale_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, acc.type.layout))
        scale = gl.convert_layout(scale, scale_layout, assert_trivial=True)
        acc = add_product(acc, by_halves(sums), gl.expand_dims(gl.expand_dims(scale, 1), 1))
        acc = gl.reshape(gl.permute(acc, (0, 1, 3, 2)), [64, acc.shape[1] * 16])
        acc = gl.convert_layout(acc, layout, assert_trivial=True)
    else:
        acc = add_product(acc, sums, gl.expand_dims(scale, 1))
    return acc


@gluon.jit
def store_columns(
    y, result_smem, out_ptr, slots_ptr, first, rows, num_slots, column8, columns8, SCATTER: gl.constexpr
):
    """(64, W) y, W at most 64, to rows first.. of the tile (of their slots where SCATTER), 16 bytes a thread."""
    W: gl.constexpr = y.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // W, W // 8], [4, 1], [1, 0])
    # All of the buffer, as Triton 3.8 wants it.
    rows_smem = view(result_smem, [64 // W, 64, W], gl.NVMMASharedLayout(W * 2, 16, 2)).index(0)
    rows_smem.store(y)
    y = rows_smem.load(layout)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, W, layout=gl.SliceLayout(0, layout))
    if SCATTER:
        slot = gl.load(slots_ptr + first + row, mask=row < rows, other=-1)
        slot = gl.where(slot < num_slots, slot, -1)
    else:
        slot = gl.where(row < rows, first + row, -1)
    num_columns = columns8.to(gl.int64) * 8
    ptrs = out_ptr + column8 * 8 + gl.expand_dims(slot.to(gl.int64) * num_columns, 1) + gl.expand_dims(c, 0)
    gl.store(ptrs, y, mask=gl.expand_dims(slot >= 0, 1) & gl.expand_dims(column8 + c // 8 < columns8, 0))


@gluon.jit
def store_sums(
    acc,
    result_smem,
    out_ptr,
    bias_ptr,
    stride_bn,
    slots_ptr,
    first,
    rows,
    num_slots,
    column8,
    columns8,
    EPILOGUE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    INTERLEAVED: gl.constexpr,
):
    """64 tokens' sums of N weight rows: bias, activation, and rows of the result."""
    if rows > 0:
        layout: gl.constexpr = acc.type.layout
        N: gl.constexpr = acc.shape[1]
        if HAS_BIAS:
            row, mask = weight_rows(column8, columns8, EPILOGUE, INTERLEAVED, gl.SliceLayout(0, layout), N)
            bias = gl.load(bias_ptr + row * stride_bn, mask=mask, other=0.0).to(gl.float32)
            acc = acc + gl.expand_dims(bias, 0)
        if EPILOGUE == "gated":
            gate, up = gl.split(by_halves(acc))
            y = gl.reshape(epilogue(gate, up).to(out_ptr.dtype.element_ty), [64, N // 2])
        elif EPILOGUE == "ungated":
            y = epilogue(acc, acc).to(out_ptr.dtype.element_ty)
        else:
            y = acc.to(out_ptr.dtype.element_ty)
        SCATTER: gl.constexpr = EPILOGUE == "none"
        if y.shape[1] == 128:
            left, right = halves(y, 64, 64)
            store_columns(
                left, result_smem, out_ptr, slots_ptr, first, rows, num_slots, column8, columns8, SCATTER
            )
            store_columns(
                right, result_smem, out_ptr, slots_ptr, first, rows, num_slots, column8 + 8, columns8, SCATTER
            )
        else:
            store_columns(
                y, result_smem, out_ptr, slots_ptr, first, rows, num_slots, column8, columns8, SCATTER
            )


@gluon.jit
def consume_block_tile(
    w_smem,
    x_smem,
    result_smem,
    scales,
    full,
    empty,
    stage,
    phase,
    num_k,
    out_ptr,
    bias_ptr,
    stride_bn,
    slots_ptr,
    first,
    rows,
    num_slots,
    tile_n,
    columns8,
    WHICH: gl.constexpr,
    MAIN: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    GATHER: gl.constexpr,
    TWO: gl.constexpr,
):
    """One consumer's half of a tile: of its MAIN tokens, or, if these are 64, of its weight rows."""
    BOXES: gl.constexpr = x_smem.shape[0] // STAGES // 2  # of 64 tokens
    STEP: gl.constexpr = x_smem.shape[2]
    N: gl.constexpr = 64 if MAIN == 64 else 128
    BOX: gl.constexpr = 0 if MAIN == 64 else WHICH * (MAIN // 128)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    acc0 = gl.zeros([64, N], gl.float32, layout)
    if MAIN == 256:
        acc1 = gl.zeros([64, N], gl.float32, layout)
    boxes = view(x_smem, [STAGES * BOXES, 64, STEP], x_smem.layout)
    weights = view(w_smem, [STAGES * (128 // N), N, STEP], w_smem.layout)
    x_scales, w_scales = scales
    for _ in range(num_k):
        mbarrier.wait(full.index(stage), phase)
        if GATHER:
            # cp.async wrote x through the generic proxy.
            fence_async_shared()
        box = stage * BOXES + BOX
        if MAIN == 64:
            w = weights.index(2 * stage + WHICH)
        else:
            w = weights.index(stage)
        x_scale = x_scales.index(stage)
        sums = step_sums(boxes.index(box), w, N, layout)
        scale = load_scales(x_scale.slice(64 * BOX, 64), w_scales, stage, layout, TWO)
        acc0 = add_scaled(acc0, sums, scale, TWO)
        if MAIN == 256:
            sums = step_sums(boxes.index(box + 1), w, N, layout)
            scale = load_scales(x_scale.slice(64 * BOX + 64, 64), w_scales, stage, layout, TWO)
            acc1 = add_scaled(acc1, sums, scale, TWO)
        # Products are done, and scales read, in each warp.
        warps_barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    WIDTH8: gl.constexpr = result_columns(EPILOGUE) // 8
    if MAIN == 64:
        column8 = (2 * tile_n + WHICH) * WIDTH8
    else:
        column8 = 2 * tile_n * WIDTH8
    store_sums(
        acc0, result_smem, out_ptr, bias_ptr, stride_bn, slots_ptr, first + 64 * BOX, rows - 64 * BOX, num_slots,
        column8, columns8, EPILOGUE, HAS_BIAS, INTERLEAVED,
    )  # fmt: skip
    if MAIN == 256:
        store_sums(
            acc1, result_smem, out_ptr, bias_ptr, stride_bn, slots_ptr, first + 64 * BOX + 64, rows - 64 * BOX - 64,
            num_slots, column8, columns8, EPILOGUE, HAS_BIAS, INTERLEAVED,
        )  # fmt: skip
    return stage, phase
