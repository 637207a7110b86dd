"""A consumer's products of weights that it decodes, those of the next step while the tensor cores multiply."""

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
from compile_moe.ops.kernels.warp_specialized.decode_weights import (
    decoded,
    group_ptrs,
    load_groups,
    load_pairs,
)
from compile_moe.ops.kernels.warp_specialized.ring import next_stage


@gluon.jit
def multiply_step(w, x_smem, tail_smem, stage, acc, tail, STAGES: gl.constexpr, TAIL: gl.constexpr):
    """Start a step's products."""
    MAIN: gl.constexpr = acc.shape[1]
    BOXES: gl.constexpr = x_smem.shape[0] // STAGES * 32 // MAIN  # of a stage
    x = view(x_smem, [STAGES * BOXES, MAIN, 64], x_smem.layout).index(stage * BOXES)
    acc = warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
    if TAIL:
        w = gl.convert_layout(w, gl.DotOperandLayout(0, tail.type.layout, 2), assert_trivial=True)
        tail = warpgroup_mma(w, tail_smem.index(stage).permute((1, 0)), tail, is_async=True)
    return acc, tail


@gluon.jit
def multiply_decoded(
    w_smem,
    x_smem,
    tail_smem,
    full,
    empty,
    stage,
    phase,
    num_k,
    acc,
    tail,
    stored,
    expert,
    column8,
    columns8,
    WHICH: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    GATHER: gl.constexpr,
    TAIL: gl.constexpr,
    PACKED: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
):
    """Every step of a tile, of which the last one's products are still under way; weights in their registers; the stage
    and phase behind them.
    """
    dtype: gl.constexpr = x_smem.dtype
    MAIN: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    scale = None
    zero = None
    zero_row = None
    if GROUP > 0:
        scales, zeros, num_groups = stored
        scale_ptrs, zero_ptrs, mask, zero_row = group_ptrs(
            scales, zeros, expert, column8, columns8, EPILOGUE, INTERLEAVED, PACKED_ZEROS, GROUP
        )
        scale = load_groups(scale_ptrs, mask, scales[3], 0, num_groups, GROUP)
        if HAS_ZERO:
            zero = load_groups(zero_ptrs, mask, zeros[3], 0, num_groups, GROUP)
    mbarrier.wait(full.index(stage), phase)
    w = decoded(
        load_pairs(w_smem, 2 * stage + WHICH, PACKED), dtype, scale, zero, zero_row, PACKED_ZEROS, layout
    )
    for k in range(1, num_k):
        if GROUP > 0:
            scale = load_groups(scale_ptrs, mask, scales[3], k, num_groups, GROUP)
            if HAS_ZERO:
                zero = load_groups(zero_ptrs, mask, zeros[3], k, num_groups, GROUP)
        if GATHER:
            # cp.async wrote x through the generic proxy.
            fence_async_shared()
        acc, tail = multiply_step(w, x_smem, tail_smem, stage, acc, tail, STAGES, TAIL)
        stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase)
        words = load_pairs(w_smem, 2 * stage + WHICH, PACKED)
        if MAIN == 256:
            # No registers for both; meanwhile the tensor cores have the other consumer's products.
            acc, tail, _ = warpgroup_mma_wait(0, deps=(acc, tail, w))
            w = decoded(words, dtype, scale, zero, zero_row, PACKED_ZEROS, layout)
        else:
            following = decoded(words, dtype, scale, zero, zero_row, PACKED_ZEROS, layout)
            acc, tail, _ = warpgroup_mma_wait(0, deps=(acc, tail, w))
            w = following
        # The previous stage's products are done in each warp.
        warps_barrier()
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
    if GATHER:
        fence_async_shared()
    acc, tail = multiply_step(w, x_smem, tail_smem, stage, acc, tail, STAGES, TAIL)
    stage, phase = next_stage(stage, phase, STAGES)
    return acc, tail, w, stage, phase
