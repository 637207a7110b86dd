"""Products of weights in shared memory with a step's tokens: of a consumer's 64 or 128 rows of weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from compile_moe.ops.kernels.warp_specialized.compat import appended, view


@gluon.jit
def start_part(w, x, rest, sums, IS_FIRST: gl.constexpr, TAIL: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Of 64 rows of weights, added to accumulator and tail of ``sums`` or, of the first step, in their place."""
    acc, tail = sums
    if TRANSPOSED:
        w = w.permute((1, 0))
    acc = warpgroup_mma(w, x.permute((1, 0)), acc, use_acc=not IS_FIRST, is_async=True)
    if TAIL:
        tail = warpgroup_mma(w, rest.permute((1, 0)), tail, use_acc=not IS_FIRST, is_async=True)
    return acc, tail


@gluon.jit
def zero_sums(TOKENS: gl.constexpr, PARTS: gl.constexpr):
    """An accumulator of TOKENS and a tail, of each of PARTS times 64 rows of weights."""
    main_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    acc = gl.zeros([64, TOKENS], gl.float32, main_layout)
    tail = gl.zeros([64, 32], gl.float32, tail_layout)
    return ((acc, tail),) * PARTS


@gluon.jit
def wait_for_products(sums, STEPS: gl.constexpr, TAIL: gl.constexpr):
    """``sums`` without the products of the last STEPS steps."""
    LEFT: gl.constexpr = STEPS * len(sums) * (2 if TAIL else 1)
    acc, tail = sums[0]
    if len(sums) == 1:
        if TAIL:
            acc, tail = warpgroup_mma_wait(LEFT, deps=(acc, tail))
        else:
            acc = warpgroup_mma_wait(LEFT, deps=(acc,))
        return ((acc, tail),)
    else:
        acc1, tail1 = sums[1]
        if TAIL:
            acc, tail, acc1, tail1 = warpgroup_mma_wait(LEFT, deps=(acc, tail, acc1, tail1))
        else:
            acc, acc1 = warpgroup_mma_wait(LEFT, deps=(acc, acc1))
        return (acc, tail), (acc1, tail1)


@gluon.jit
def start_products(
    w_smem,
    x_smem,
    tail_smem,
    stage,
    sums,
    IS_FIRST: gl.constexpr,
    WHICH: gl.constexpr,
    TAIL: gl.constexpr,
    STAGES: gl.constexpr,
    GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Of a step, with those of the step before done. ``sums``: an accumulator and a tail of each 64 rows of weights."""
    MAIN: gl.constexpr = sums[0][0].shape[1]
    BOXES: gl.constexpr = x_smem.shape[0] // STAGES * 32 // MAIN  # of a stage
    if GATHER:
        # cp.async wrote x through the generic proxy.
        fence_async_shared()
    x = view(x_smem, [STAGES * BOXES, MAIN, 64], x_smem.layout).index(stage * BOXES)
    rest = tail_smem.index(stage)
    w = len(sums) * (2 * stage + WHICH)
    started = ()
    for i in gl.static_range(len(sums)):
        part = start_part(w_smem.index(w + i), x, rest, sums[i], IS_FIRST, TAIL, TRANSPOSED)
        started = appended(started, part)
    return wait_for_products(started, 1, TAIL)
