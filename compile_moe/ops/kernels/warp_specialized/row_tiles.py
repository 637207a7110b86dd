"""Which rows each tile computes: a list that both kernels walk."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.tiles import device_limits

ROWS = 256  # of a tile, unless the ring has room for fewer: down to FEWEST_ROWS
FEWEST_ROWS = 64
TAIL = 32  # rows that a tile may have more
MERGED = 96  # rows of an expert beyond a multiple of ROWS that become tails, and no tile of their own
GROUP = 8  # most tiles of one expert that share the loads of weights from memory
FIELDS = 4


@triton.jit
def rows_of(expert_offsets_ptr, e, num_slots, num_experts):
    """First row and number of rows of each expert, within the slots whatever the offsets are."""
    start = tl.load(expert_offsets_ptr + e, mask=e < num_experts, other=num_slots)
    end = tl.load(expert_offsets_ptr + e + 1, mask=e < num_experts, other=num_slots)
    start = tl.minimum(tl.maximum(start, 0), num_slots)
    end = tl.minimum(tl.maximum(end, start), num_slots)
    return start, tl.where(e < num_experts, end - start, 0)


@triton.jit
def tiles_of(rows, ROWS: tl.constexpr, TAIL: tl.constexpr, MERGED: tl.constexpr):
    """Tiles of an expert's rows, and how many of these are tails of its first tiles."""
    rest = rows % ROWS
    tails = tl.where(rest <= tl.minimum(rows // ROWS * TAIL, MERGED), rest, 0)
    return (rows - tails + ROWS - 1) // ROWS, tails


@triton.jit(do_not_specialize=["num_slots", "num_experts", "most_tiles"])
def row_tiles_kernel(
    tiles_ptr,  # (1 + most_tiles, FIELDS): the number of tiles and 0, that of taken ones, then the tiles
    expert_offsets_ptr,  # (E + 1,)
    num_slots,
    num_experts,
    most_tiles,
    E_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    MERGED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tiles of an expert: (expert, first row, rows, 256 * (tiles of its group before it) + tiles of its group).

    An expert's rows beyond a multiple of ROWS, if no more than MERGED, are tails of TAIL of its first tiles. Offsets
    are clamped, so that no content of expert_offsets leads outside the rows. Experts with more rows come first: what
    programs take last is the least.
    """
    expert = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    _, every = rows_of(expert_offsets_ptr, e, num_slots, num_experts)
    start, rows = rows_of(expert_offsets_ptr, expert, num_slots, num_experts)
    every_tiles, _ = tiles_of(every, ROWS, TAIL, MERGED)
    is_before = (every > rows) | ((every == rows) & (e < expert))
    # Experts' rows may overlap where the offsets make no sense: the tiles may then be more than the list holds.
    first_tile = tl.minimum(tl.sum(tl.where(is_before, every_tiles, 0).to(tl.int64), 0), most_tiles).to(
        tl.int32
    )
    tiles, tails = tiles_of(rows, ROWS, TAIL, MERGED)
    # Groups of nearly equal sizes, larger ones first.
    groups = tl.maximum((tiles + GROUP - 1) // GROUP, 1)
    small = tl.maximum(tiles // groups, 1)
    larger = tiles % groups * (small + 1)
    for first in range(0, tl.minimum(tiles, most_tiles - first_tile), BLOCK):
        index = first + tl.arange(0, BLOCK)
        before = index * ROWS + tl.minimum(index * TAIL, tails)
        most = ROWS + tl.minimum(tl.maximum(tails - index * TAIL, 0), TAIL)
        in_group = tl.where(index < larger, index % (small + 1), (index - larger) % small)
        size = tl.where(index < larger, small + 1, small)
        out = tiles_ptr + 4 + 4 * (first_tile + index)
        mask = (index < tiles) & (first_tile + index < most_tiles)
        tl.store(out, tl.zeros((BLOCK,), tl.int32) + expert, mask=mask)
        tl.store(out + 1, start + before, mask=mask)
        tl.store(out + 2, tl.minimum(rows - before, most), mask=mask)
        tl.store(out + 3, in_group * 256 + size, mask=mask)
    if expert == 0:
        total = tl.minimum(tl.sum(every_tiles.to(tl.int64), 0), most_tiles).to(tl.int32)
        tl.store(tiles_ptr, total)
        tl.store(tiles_ptr + 1, 0)
        if total == 0:
            # An empty list has a tile without rows, which the kernels read but don't compute.
            field = tl.arange(0, 4)
            tl.store(tiles_ptr + 4 + field, tl.where(field == 3, 1, 0))


def max_row_tiles(num_rows: int, num_slots: int, num_experts: int) -> int:
    """Upper bound on the tiles of ``num_rows``, at least 1: each expert has at most one that isn't full."""
    return max(1, num_slots // num_rows + min(num_experts, num_slots))


def scratch(sorted_slots: Tensor, num_experts: int) -> Tensor:
    """Memory for the list, whatever the rows of a tile."""
    most = max_row_tiles(FEWEST_ROWS, sorted_slots.size(0), num_experts)
    return sorted_slots.new_empty(FIELDS * (most + 1))


def scratch_if_needed(sorted_slots: Tensor, num_experts: int, rows: int | None) -> Tensor | None:
    """Memory for the list where the kernels may be chosen: from so many rows of an average expert on, if at all."""
    if rows is None or sorted_slots.size(0) < rows * num_experts:
        return None
    if device_limits(sorted_slots.device.index).warp_specialized:
        return scratch(sorted_slots, num_experts)
    return None


def launch_for(
    num_rows: int,
    tiles: Tensor,
    expert_offsets: Tensor,
    num_slots: int,
    num_experts: int,
    has_tails: bool = True,
) -> Launch:
    """The launch that writes the list of tiles of ``num_rows``, and tails if they may have some."""
    options = {
        "E_POW2": triton.next_power_of_2(max(num_experts, 2)),
        "ROWS": num_rows,
        "TAIL": TAIL,
        "MERGED": MERGED if has_tails else 0,
        "GROUP": GROUP,
        "BLOCK": 32,
        "num_warps": 4,
    }
    most_tiles = max_row_tiles(num_rows, num_slots, num_experts)
    args = (tiles, expert_offsets, num_slots, num_experts, most_tiles)
    return Launch(row_tiles_kernel, (max(num_experts, 1),), args, options)
