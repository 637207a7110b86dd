"""The ring of buffers between producer and consumers, and the order of tiles, which the producer announces."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

STAGES = 4  # of a ring with room for 256 rows of tokens and a tail
STEP_BYTES = gl.constexpr(128)  # of each row, in a stage: what the swizzled layouts of shared memory hold
COLUMNS = gl.constexpr(16)  # column tiles that a group of row tiles takes at a time


@gluon.jit
def allocate(
    dtype: gl.constexpr,
    result_dtype: gl.constexpr,
    STAGES: gl.constexpr,
    FULL_COUNT: gl.constexpr,
    ROWS: gl.constexpr = 256,
    STORED_BYTES: gl.constexpr = 0,
    TAILS: gl.constexpr = True,
    PARTS: gl.constexpr = 1,
):
    """Weights, tokens in boxes of 32, tails, which tile begins there and barriers, of each stage; and space to
    transpose results in.

    Args:
        ROWS: of tokens in a stage, without the tail: 64, 128 or 256.
        STORED_BYTES: of each weight row in a stage, where weights are decoded; otherwise they are in dtype.
        TAILS: whether tiles have some; otherwise their buffer is that of the tokens, and isn't used.
        PARTS: of 64 rows of weights, for each consumer in a stage.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, 2)
    STEP: gl.constexpr = STEP_BYTES * 8 // dtype.primitive_bitwidth
    if STORED_BYTES > 0:
        w_layout: gl.constexpr = gl.NVMMASharedLayout(STORED_BYTES, 8, 2)
        w_smem = gl.allocate_shared_memory(gl.uint8, [2 * PARTS * STAGES, 64, STORED_BYTES], w_layout)
    else:
        w_smem = gl.allocate_shared_memory(dtype, [2 * PARTS * STAGES, 64, STEP], layout)
    x_smem = gl.allocate_shared_memory(dtype, [ROWS // 32 * STAGES, 32, STEP], layout)
    if TAILS:
        tail_smem = gl.allocate_shared_memory(dtype, [STAGES, 32, STEP], layout)
    else:
        tail_smem = x_smem
    result_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    result_smem = gl.allocate_shared_memory(result_dtype, [2, 64, 64], result_layout)
    tile_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=FULL_COUNT)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    return w_smem, x_smem, tail_smem, result_smem, tile_smem, full, empty


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def find_tile(tiles_ptr, tile, num_row_tiles, num_n):
    """Expert, first row, rows and column tile of a tile (of the last one behind the end).

    A group of row tiles takes COLUMNS column tiles at a time, and within them columns change fastest: programs that
    run side by side read the same rows, which are the larger operand, and all of them together fit the L2 cache.
    """
    tile = gl.maximum(gl.minimum(tile, num_row_tiles * num_n - 1), 0)
    row_tile = tile // num_n
    group = gl.load(tiles_ptr + 4 + 4 * row_tile + 3)
    size = gl.maximum(group & 255, 1)
    first_of_group = row_tile - (group >> 8)
    within = tile - first_of_group * num_n
    column_tile = within // (size * COLUMNS) * COLUMNS
    within -= column_tile * size
    columns = gl.maximum(gl.minimum(num_n - column_tile, COLUMNS), 1)
    row_tile = first_of_group + within // columns
    column_tile += within % columns
    # Clamped for what an empty list holds.
    entry = tiles_ptr + 4 + 4 * gl.minimum(gl.maximum(row_tile, 0), gl.maximum(num_row_tiles - 1, 0))
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), column_tile


@gluon.jit
def take_tile(tiles_ptr):
    """A tile that no program has. Each has two from the start, numbered in turn; who is ready takes the next."""
    return 2 * gl.num_programs(0) + gl.atomic_add(tiles_ptr + 1, 1, sem="relaxed")


@gluon.jit
def announce_end(tile_smem, full, stage, ARRIVE_AS_COPIES: gl.constexpr):
    """By the producer, in an empty stage behind its last tile: one of -1 rows."""
    announce_tile(tile_smem, stage, (0, 0, -1, 0))
    mbarrier.expect(full.index(stage), 0)
    if ARRIVE_AS_COPIES:
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def announce_tile(tile_smem, stage, tile):
    """By the producer, before its part of the full barrier of a stage that gets the tile's first step: consumers, which
    nothing feeds meanwhile, need not search.
    """
    expert, first, rows, tile_n = tile
    i = gl.arange(0, 4, layout=gl.BlockedLayout([4], [32], [4], [0]))
    first_half = gl.where(i == 0, expert, first)
    tile_smem.index(stage).store(gl.where(i < 2, first_half, gl.where(i == 2, rows, tile_n)))


@gluon.jit
def announced_tile(tile_smem, stage):
    """Expert, first row, rows and column tile of what begins with a stage that is full; -1 rows behind the last
    tile.
    """
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    i = gl.arange(0, 4, layout=layout)
    tile = tile_smem.index(stage).load(layout)
    expert = gl.sum(gl.where(i == 0, tile, 0), 0)
    first = gl.sum(gl.where(i == 1, tile, 0), 0)
    rows = gl.sum(gl.where(i == 2, tile, 0), 0)
    tile_n = gl.sum(gl.where(i == 3, tile, 0), 0)
    return expert, first, rows, tile_n
