"""Tiles: which rows of which expert a program computes, and how large its tile is."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """Tile sizes (rows, output columns of one accumulator, depth) and compiler options."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    swapped: bool = (
        False  # the weights are the left operand, whose rows the tensor cores read from shared memory
    )
    warp_specialized: bool = False  # one of WARP_SPECIALIZED_TILES, or of the wide ones


class DeviceLimits(NamedTuple):
    """What bounds a tile on a device."""

    shared_memory: int  # bytes a program can use
    async_mma: (
        bool  # tensor cores that read operands from shared memory: sm_90 and sm_100, not sm_80 and sm_120
    )
    warp_specialized: bool = False  # runs the kernels of ``warp_specialized``: sm_90
    multiprocessors: int = 132


#: Rows up to which each may start a row tile of its own; more were not tried, of which more tiles would be empty.
MOST_TILES_OF_ROWS = tl.constexpr(64)


@triton.jit
def _add_each(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def locate_tile(
    expert_offsets_ptr,
    tile,
    num_slots,
    num_experts,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WITH_SKIPPED: tl.constexpr,
):
    """:func:`tile_among` E_POW2 experts, more than ``num_experts``."""
    e = tl.arange(0, E_POW2)
    return tile_among(e, expert_offsets_ptr, tile, num_slots, num_experts, BLOCK_M, WITH_SKIPPED)


@triton.jit
def tile_among(
    e,
    expert_offsets_ptr,
    tile,
    num_slots,
    num_experts,
    BLOCK_M: tl.constexpr,
    WITH_SKIPPED: tl.constexpr,
):
    """Expert, first row and end row of row tile ``tile``; expert > num_experts where there is none.

    Experts' rows lie one after another; each expert has ceil(rows / BLOCK_M) tiles. The skipped slots behind the last
    expert's rows count as expert ``num_experts`` if WITH_SKIPPED. Offsets are clamped, so that no content of
    expert_offsets leads outside the rows.

    Args:
        e: 0, 1, ... beyond ``num_experts``; in Gluon, of any layout.
    """
    start = tl.load(expert_offsets_ptr + e, mask=e <= num_experts, other=num_slots)
    end = tl.load(expert_offsets_ptr + e + 1, mask=e < num_experts, other=num_slots)
    start = tl.minimum(tl.maximum(start, 0), num_slots)
    end = tl.minimum(tl.maximum(end, start), num_slots)
    rows = end - start
    if not WITH_SKIPPED:
        rows = tl.where(e < num_experts, rows, 0)
    if has_tile_of_each_row(num_slots, num_experts, BLOCK_M):
        starts = (start <= tile) & (tile < end) & ((tile - start) % BLOCK_M == 0) & (rows > 0)
        # As one number: of one expert, also where their rows overlap.
        key = tl.max(tl.where(starts, ((e + 1).to(tl.int64) << 32) | end, 0), 0)
        found, first_row, end_row = (key >> 32).to(tl.int32), tile, (key & 0x7FFFFFFF).to(tl.int32)
    else:
        tiles = (rows + BLOCK_M - 1) // BLOCK_M
        tiles_before_next = tl.cumsum(tiles, 0)
        here = (tiles_before_next > tile) & (tiles_before_next - tiles <= tile)
        first = start + (tile - (tiles_before_next - tiles)) * BLOCK_M
        # At most one lane has values that aren't zero; one reduction of all is quicker than one of each.
        found, first_row, end_row = tl.reduce(
            (tl.where(here, e + 1, 0), tl.where(here, first, 0), tl.where(here, end, 0)), 0, _add_each
        )
    return tl.where(found > 0, found - 1, num_experts + 1), first_row, end_row


@triton.jit
def has_tile_of_each_row(num_slots, num_experts, BLOCK_M: tl.constexpr):
    """Whether row tile i is the one that starts at row i, if one does: few rows, which have as many row tiles as rows.

    Then nothing that a tile loads waits for the others' sizes.
    """
    if BLOCK_M <= 32:
        return num_slots <= tl.minimum(num_experts, MOST_TILES_OF_ROWS)
    else:
        return False


@triton.jit
def early_slots(sorted_slots_ptr, row, num_slots, num_experts, BLOCK_M: tl.constexpr):
    """Slots of rows i.., which row tile i has where :func:`has_tile_of_each_row`; else -1."""
    mask = (row < num_slots) & has_tile_of_each_row(num_slots, num_experts, BLOCK_M)
    return tl.load(sorted_slots_ptr + row, mask=mask, other=-1)


@triton.jit
def slots_of_rows(early, sorted_slots_ptr, row, end_row, num_slots, num_experts, BLOCK_M: tl.constexpr):
    """Slots of a located tile's rows; -1, or the slots of other tiles, behind its end."""
    if has_tile_of_each_row(num_slots, num_experts, BLOCK_M):
        slot = early
    else:
        slot = tl.load(sorted_slots_ptr + row, mask=row < end_row, other=-1)
    return slot


@triton.jit
def grouped_order(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column tile of a program: columns change slowest within a group of GROUP_M row tiles, for the L2."""
    group_size = GROUP_M * num_n
    first_m = pid // group_size * GROUP_M
    group_m = tl.minimum(num_m - first_m, GROUP_M)
    within = pid % group_size
    return first_m + within % group_m, within // group_m


def max_row_tiles(num_slots: int, num_groups: int, block_m: int) -> int:
    """Upper bound on the sum over groups of ceil(rows / block_m): each group has at most one partial tile."""
    return min(num_slots, num_slots // block_m + min(num_groups, num_slots))


@functools.cache
def device_limits(device_index: int | None) -> DeviceLimits:
    """Limits of a CUDA device; those of an sm_90 device where kernels are interpreted (None)."""
    if device_index is None:
        return DeviceLimits(shared_memory=232448, async_mma=True)
    properties: Any = torch.cuda.get_device_properties(device_index)
    major = properties.major
    return DeviceLimits(
        properties.shared_memory_per_block_optin,
        major in (9, 10),
        major == 9,
        properties.multi_processor_count,
    )


#: The tiles of all warp-specialized kernels: one with room for many rows, those with less of it, which leave it to more
#: stages. Those of 16-bit operands may be chosen from WARP_SPECIALIZED_FROM rows of an average expert on.
WARP_SPECIALIZED = Tile(256, 128, 64, 4, 4, warp_specialized=True)
WARP_SPECIALIZED_128 = Tile(128, 128, 64, 5, 4, warp_specialized=True)
WARP_SPECIALIZED_64 = Tile(64, 128, 64, 7, 4, warp_specialized=True)
WARP_SPECIALIZED_TILES = WARP_SPECIALIZED, WARP_SPECIALIZED_128, WARP_SPECIALIZED_64
WARP_SPECIALIZED_FROM = 48
#: Those of 16-bit operands with twice as many rows of weights, for fewer tokens: a step brings half as many bytes of
#: tokens for as many products, on whose way from the L2 cache the others wait (PERFORMANCE.md).
WIDE_128 = Tile(128, 256, 64, 4, 4, warp_specialized=True)
WIDE_64 = Tile(64, 256, 64, 4, 4, warp_specialized=True)
SIXTEEN_BIT_TILES = WARP_SPECIALIZED, WIDE_128, WIDE_64, WARP_SPECIALIZED_128, WARP_SPECIALIZED_64


def row_stride(x: torch.Tensor) -> int:
    """Stride of the rows of x (rows, depth). That of a single row means nothing, but would select other code."""
    return x.stride(0) if x.size(0) > 1 else x.size(1)


def is_vectorized(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether Triton loads 16 bytes at once of the rows of x (rows, depth) and w; a row is what has stride 1.

    It knows of strides that they are multiples of 16 elements, and nothing of other multiples of 16 bytes.
    """
    strides = [
        row_stride(x),
        *(s for t in (x[:1], w) for size, s in zip(t.shape, t.stride(), strict=True) if size > 1),
    ]
    return all(stride == 1 or stride % 16 == 0 for stride in strides)
