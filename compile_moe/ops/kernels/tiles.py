"""Tiles: which rows of which expert a program computes, and how large its tile is."""

from __future__ import annotations

import functools
from typing import NamedTuple

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


class DeviceLimits(NamedTuple):
    shared_memory: int  # bytes a program can use


@triton.jit
def locate_tile(
    expert_offsets_ptr, tile, num_slots, num_experts, E_POW2: tl.constexpr, BLOCK_M: tl.constexpr, WITH_SKIPPED: tl.constexpr
):
    """Expert, first row and end row of row tile ``tile``; expert > num_experts where there is none.

    Experts' rows lie one after another; each expert has ceil(rows / BLOCK_M) tiles. The skipped slots behind the last
    expert's rows count as expert ``num_experts`` if WITH_SKIPPED. Offsets are clamped, so that no content of
    expert_offsets leads outside the rows.
    """
    e = tl.arange(0, E_POW2)
    start = tl.load(expert_offsets_ptr + e, mask=e <= num_experts, other=num_slots)
    end = tl.load(expert_offsets_ptr + e + 1, mask=e < num_experts, other=num_slots)
    start = tl.minimum(tl.maximum(start, 0), num_slots)
    end = tl.minimum(tl.maximum(end, start), num_slots)
    rows = end - start
    if not WITH_SKIPPED:
        rows = tl.where(e < num_experts, rows, 0)
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    tiles_before_next = tl.cumsum(tiles, 0)
    here = (tiles_before_next > tile) & (tiles_before_next - tiles <= tile)
    found = tl.sum(here.to(tl.int32), 0)
    expert = tl.sum(tl.where(here, e, 0), 0)
    first_row = tl.sum(tl.where(here, start + (tile - (tiles_before_next - tiles)) * BLOCK_M, 0), 0)
    end_row = tl.sum(tl.where(here, end, 0), 0)
    return tl.where(found > 0, expert, num_experts + 1), first_row, end_row


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


@functools.lru_cache(maxsize=None)
def device_limits(device_index: int | None) -> DeviceLimits:
    """Limits of a CUDA device; those of an sm_90 device where kernels are interpreted (None)."""
    if device_index is None:
        return DeviceLimits(shared_memory=232448)
    properties = torch.cuda.get_device_properties(device_index)
    return DeviceLimits(shared_memory=properties.shared_memory_per_block_optin)


_ROW_TILES = (16, 32, 64, 128)


@functools.lru_cache(maxsize=None)
def tile_candidates(
    itemsize: int, num_columns: int, num_accumulators: int, limits: DeviceLimits
) -> tuple[Tile, ...]:
    """One tile for each row count of ``_ROW_TILES``, within the shared memory of the device.

    Few rows: an expert's weights are read once, so short, deep tiles that keep many loads in flight. Many rows:
    tiles whose accumulators fill the register file (128 x 256 float32 over 8 warps).
    """
    tiles = []
    for block_m in _ROW_TILES:
        if itemsize == 4:
            # IEEE float32 runs on the ordinary units: what bounds it is registers, not operand traffic.
            tile = Tile(min(block_m, 64), 64 // num_accumulators, 32, 2, 4)
        elif block_m <= 32:
            tile = Tile(block_m, 64 // num_accumulators, 128, 4, 4)
        elif block_m == 64:
            tile = Tile(block_m, 128 // num_accumulators, 64, 4, 4)
        else:
            tile = Tile(block_m, 256 // num_accumulators, 64, 3, 8)
        while _shared_memory(tile, itemsize, num_accumulators) > limits.shared_memory and tile.num_stages > 2:
            tile = tile._replace(num_stages=tile.num_stages - 1)
        while _shared_memory(tile, itemsize, num_accumulators) > limits.shared_memory and tile.block_k > 32:
            tile = tile._replace(block_k=tile.block_k // 2)
        # Narrow matrices: no tile wider than the next power of two of the columns.
        block_n = max(16, min(tile.block_n, triton.next_power_of_2(num_columns)))
        tiles.append(tile._replace(block_n=block_n))
    return tuple(dict.fromkeys(tiles))


def _shared_memory(tile: Tile, itemsize: int, num_accumulators: int) -> int:
    return tile.num_stages * tile.block_k * (tile.block_m + num_accumulators * tile.block_n) * itemsize


def choose_tile(candidates: tuple[Tile, ...], num_slots: int, num_experts: int) -> Tile:
    """Smallest row tile that holds the average expert's rows with room to spare, else the largest."""
    average = num_slots / min(num_experts, max(num_slots, 1))
    for tile in candidates:
        if average <= 0.75 * tile.block_m:
            return tile
    return candidates[-1]
