"""Scales of groups of 128 columns: those of each step in a ring of their own, which producers fill beside the other.

What producers take as ``scales``: the tokens' and the strides of their rows and groups; the weights' and the strides of
their experts, blocks of rows and groups; eighths of the result's columns; the ring.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.warp_specialized.compat import copy_rows
from compile_moe.ops.kernels.warp_specialized.weight_rows import weight_rows

# Of what a warpgroup copies, an element a thread.
COPIES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def allocate_scale_ring(STAGES: gl.constexpr):
    """For each stage, scales of a tile's tokens, of its tail's and of both consumers' weight rows."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return (
        gl.allocate_shared_memory(gl.float32, [STAGES, 256], layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 32], layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 128], layout),
    )


@gluon.jit
def token_slots(slots_ptr, first, rows, before):
    """Slots of a tile's 256 rows, and of 32 behind the first ``before``; 0 beyond the tile."""
    t = gl.arange(0, 256, layout=COPIES)
    u = before + gl.arange(0, 32, layout=COPIES)
    p = slots_ptr + first
    return gl.load(p + t, mask=t < rows, other=0), gl.load(p + u, mask=u < rows, other=0)


@gluon.jit
def token_scale_ptrs(scales, slots, num_slots, topk):
    """To the first group's scales of these slots' tokens."""
    slot, tail = slots
    slot = gl.where((slot >= 0) & (slot < num_slots), slot, 0)
    tail = gl.where((tail >= 0) & (tail < num_slots), tail, 0)
    ptr, stride = scales[0], scales[1]
    return ptr + (slot // topk).to(gl.int64) * stride, ptr + (tail // topk).to(gl.int64) * stride


@gluon.jit
def row_scale_ptrs(scales, first, rows, before):
    """To the first group's scales of a tile's 256 rows, and of 32 behind the first ``before``; within the tile."""
    t = gl.arange(0, 256, layout=COPIES)
    u = before + gl.arange(0, 32, layout=COPIES)
    t = first + gl.where(t < rows, t, 0)
    u = first + gl.where(u < rows, u, 0)
    ptr, stride = scales[0], scales[1]
    return ptr + t.to(gl.int64) * stride, ptr + u.to(gl.int64) * stride


@gluon.jit
def weight_scale_ptrs(
    scales, expert, tile_n, EPILOGUE: gl.constexpr, INTERLEAVED: gl.constexpr, BLOCK_ROWS: gl.constexpr
):
    """To the first group's scales of both consumers' weight rows, and which of these rows there are."""
    ptr, stride_e, stride_n, columns8 = scales[3], scales[4], scales[5], scales[7]
    WIDTH8: gl.constexpr = 8 if EPILOGUE == "gated" else 16
    row, mask = weight_rows(tile_n * WIDTH8, columns8, EPILOGUE, INTERLEAVED, COPIES, 128)
    return ptr + expert.to(gl.int64) * stride_e + (row // BLOCK_ROWS).to(gl.int64) * stride_n, mask


@gluon.jit
def copy_step_scales(scales, stage, k, ptrs, w_ptrs, has_tail):
    """Step k's scales to a stage of the ring; zeros for weight rows that there are not."""
    main, tail = ptrs
    w, mask = w_ptrs
    x_smem, tail_smem, w_smem = scales[8]
    k = k.to(gl.int64)
    copy_rows(x_smem.index(stage), main + k * scales[2])
    if has_tail:
        copy_rows(tail_smem.index(stage), tail + k * scales[2])
    copy_rows(w_smem.index(stage), w + k * scales[6], mask=mask)
