"""Products of 8 bits: sums of a step beside those of all steps, or added to them; parts of a tile's sums."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from compile_moe.ops.kernels.warp_specialized.store import halves


@gluon.jit
def step_sums(left, right, N: gl.constexpr, layout: gl.constexpr):
    """Of a step alone: 64 rows of one operand times N of the other."""
    zeros = gl.zeros([64, N], gl.float32, layout)
    return warpgroup_mma(left, right.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def add_products(w, x, acc):
    return warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)


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
