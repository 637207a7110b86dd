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


@triton.jit(do_not_specialize=["num_slots", "num_experts"])
def row_tiles_kernel(
    tiles_ptr,  # (1 + number of programs, FIELDS): the number of tiles and 0, that of taken ones, then the tiles
    expert_offsets_ptr,  # (E + 1,)
    num_slots,
    num_experts,
    E_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    MERGED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile is (expert, first row, rows, 256 * (tiles of its group before it) + tiles of its group).

    An expert's rows beyond a multiple of ROWS, if no more than MERGED, are tails of TAIL of its first tiles. Offsets
    are clamped, so that no content of expert_offsets leads outside the rows. Experts with more rows come first: what
    programs take last is the least.
    """
    tile = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    # Of few bits, so that with the expert it is one number; beyond them, any order.
    MOST: tl.constexpr = 2**31 // E_POW2 - 1
    _, rows = rows_of(expert_offsets_ptr, e, num_slots, num_experts)
    e = E_POW2 - 1 - tl.sort(tl.minimum(rows, MOST) * E_POW2 + (E_POW2 - 1 - e), descending=True) % E_POW2
    start, rows = rows_of(expert_offsets_ptr, e, num_slots, num_experts)
    whole = rows // ROWS
    rest = rows % ROWS
    in_tails = rest <= tl.minimum(whole * TAIL, MERGED)
    tiles = whole + tl.where((rest > 0) & (in_tails == 0), 1, 0)
    after = tl.cumsum(tiles, 0)
    here = (after > tile) & (after - tiles <= tile)
    expert = tl.sum(tl.where(here, e, 0), 0)
    index = tile - tl.sum(tl.where(here, after - tiles, 0), 0)
    tails = tl.sum(tl.where(here & in_tails, rest, 0), 0)
    before = index * ROWS + tl.minimum(index * TAIL, tails)
    most = ROWS + tl.minimum(tl.maximum(tails - index * TAIL, 0), TAIL)
    first = tl.sum(tl.where(here, start, 0), 0) + before
    left = tl.sum(tl.where(here, rows, 0), 0) - before
    # Groups of nearly equal sizes, larger ones first.
    tiles_here = tl.maximum(tl.sum(tl.where(here, tiles, 0), 0), 1)
    groups = (tiles_here + GROUP - 1) // GROUP
    size = tiles_here // groups
    larger = tiles_here % groups * (size + 1)
    in_group = tl.where(index < larger, index % (size + 1), (index - larger) % size)
    size = tl.where(index < larger, size + 1, size)
    # Experts' rows may overlap where the offsets make no sense: the tiles may then be more than the list holds.
    total = tl.minimum(tl.sum(tiles, 0), tl.num_programs(0))
    found = tile < total
    # An empty list has a tile without rows, which the kernels read but don't compute.
    out = tiles_ptr + 4 + 4 * tile
    tl.store(out, tl.where(found, expert, 0))
    tl.store(out + 1, tl.where(found, first, 0))
    tl.store(out + 2, tl.where(found, tl.minimum(left, most), 0))
    tl.store(out + 3, tl.where(found, in_group * 256 + size, 1))
    if tile == 0:
        tl.store(tiles_ptr, total)
        tl.store(tiles_ptr + 1, 0)


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
        "num_warps": 4,
    }
    grid = (max_row_tiles(num_rows, num_slots, num_experts),)
    return Launch(row_tiles_kernel, grid, (tiles, expert_offsets, num_slots, num_experts), options)
