"""Scales of groups of 128 columns: those of each step in a ring of their own, which producers fill beside the other.

What producers take as ``scales``: the tokens' and the strides of their rows and groups; the weights' and the strides of
their experts, blocks of rows and groups; eighths of the result's columns; the ring. All weight rows of a tile are of
one block, or those of the gate and those of up, which then have two scales.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.warp_specialized.compat import copy_rows

TILE_ROWS = 128  # of weights, that the consumers multiply
# Of what a warpgroup copies, an element a thread.
COPIES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.constexpr_function
def has_two_scales(epilogue: str, interleaved: bool) -> bool:
    """Whether gate and up lie in halves of an expert's rows: in blocks of their own."""
    return epilogue == "gated" and not interleaved


@gluon.jit
def allocate_scale_ring(STAGES: gl.constexpr):
    """For each stage, scales of a tile's tokens, and both of its weights."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return (
        gl.allocate_shared_memory(gl.float32, [STAGES, 256], layout),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1], layout),
    )


@gluon.jit
def token_slots(slots_ptr, first, rows):
    """Slots of a tile's 256 rows; 0 beyond the tile."""
    t = gl.arange(0, 256, layout=COPIES)
    return gl.load(slots_ptr + first + t, mask=t < rows, other=0)


@gluon.jit
def token_scale_ptrs(scales, slot, num_slots, topk):
    """To the first group's scales of these slots' tokens."""
    slot = gl.where((slot >= 0) & (slot < num_slots), slot, 0)
    return scales[0] + (slot // topk).to(gl.int64) * scales[1]


@gluon.jit
def row_scale_ptrs(scales, first, rows):
    """To the first group's scales of a tile's 256 rows; within the tile."""
    t = gl.arange(0, 256, layout=COPIES)
    row = first + gl.where(t < rows, t, 0)
    return scales[0] + row.to(gl.int64) * scales[1]


@gluon.jit
def weight_scale_ptrs(scales, expert, tile_n, TWO: gl.constexpr, BLOCK_ROWS: gl.constexpr):
    """To the first group's scales of a tile's weight rows: of gate and up where TWO, else twice the same."""
    ptr = scales[3] + expert.to(gl.int64) * scales[4]
    if TWO:
        first = tile_n * 64
        second = scales[7] * 8 + first
    else:
        first = tile_n * 128
        second = first
    first_ptr = ptr + (first // BLOCK_ROWS).to(gl.int64) * scales[5]
    return first_ptr, ptr + (second // BLOCK_ROWS).to(gl.int64) * scales[5]


@gluon.jit
def copy_step_scales(scales, stage, k, ptrs, w_ptrs, TWO: gl.constexpr):
    """Step k's scales to a stage of the ring."""
    x_smem, w_smem = scales[8]
    k = k.to(gl.int64)
    copy_rows(x_smem.index(stage), ptrs + k * scales[2])
    one = gl.arange(0, 1, layout=COPIES)
    copy_rows(w_smem.index(2 * stage), w_ptrs[0] + k * scales[6] + one)
    if TWO:
        copy_rows(w_smem.index(2 * stage + 1), w_ptrs[1] + k * scales[6] + one)
