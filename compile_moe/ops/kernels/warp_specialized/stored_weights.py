"""Weights as they are stored, in 4 or 8 bits: a ring of their own, loads for which run ahead of the other ring's."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from compile_moe.ops.kernels.warp_specialized.compat import copy_box, view
from compile_moe.ops.kernels.warp_specialized.ring import find_tile

COLUMNS = gl.constexpr(64)  # of 16 bits, a step of the ring


@gluon.jit
def allocate_stored_ring(SLOTS: gl.constexpr, PACKED: gl.constexpr):
    """128 weight rows of a step a slot, and barriers."""
    BYTES: gl.constexpr = COLUMNS // PACKED
    smem = gl.allocate_shared_memory(gl.uint8, [SLOTS, 128, BYTES], gl.NVMMASharedLayout(BYTES, 8, 2))
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    return smem, full


@gluon.jit
def request(stored, desc, slot, tile, k, expert, tile_n, num_tiles, EPILOGUE: gl.constexpr):
    """Load step k of a tile into a slot that every warp has read, if there is such a tile."""
    smem, full = stored
    SLOTS: gl.constexpr = smem.shape[0]
    BYTES: gl.constexpr = smem.shape[2]
    if tile < num_tiles:
        bar = full.index(slot)
        box = view(smem, [SLOTS] + desc.block_shape, desc.layout).index(slot)  # noqa: RUF005
        mbarrier.expect(bar, 128 * BYTES)
        if EPILOGUE == "gated":
            copy_box(desc, [expert, tile_n * 8, 0, 0, k * BYTES], bar, box)
        else:
            copy_box(desc, [expert, tile_n * 128, k * BYTES], bar, box)


@gluon.jit
def step_behind(tile, k, expert, tile_n, next_expert, next_n, tiles_ptr, num_row_tiles, num_n, num_k):
    """The step behind step k of a tile, perhaps of this program's next tile."""
    k += 1
    if k == num_k:
        k = 0
        tile += gl.num_programs(0)
        expert = next_expert + 0
        tile_n = next_n + 0
        next_expert, _, _, next_n = find_tile(tiles_ptr, tile + gl.num_programs(0), num_row_tiles, num_n)
    return tile, k, expert, tile_n, next_expert, next_n
