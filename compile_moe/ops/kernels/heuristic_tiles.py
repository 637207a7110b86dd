"""The tile of a GEMM where none was tuned: from its shape, the rows of an average expert, and the device's limits."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import triton

from compile_moe.ops.kernels.tiles import (
    WARP_SPECIALIZED,
    WARP_SPECIALIZED_64,
    WARP_SPECIALIZED_128,
    WIDE_64,
    WIDE_128,
    DeviceLimits,
    Tile,
)

#: By rows, what differs among tiles of as many: (block_n, block_k, num_stages, swapped).
_TilesOfRows = dict[int, tuple[tuple[int, int, int, bool], ...]]

#: Rows of an average expert from which they are taken unless something else was tuned: where the next smaller tile
#: would be too small for a tenth of the experts, whose weights then are read twice (16-bit ones; between the numbers
#: measured on an H200: 48 and 56, 80 and 96, 128 and 160).
WARP_SPECIALIZED_PAYS_FROM = {WARP_SPECIALIZED_64: 56, WARP_SPECIALIZED_128: 84, WARP_SPECIALIZED: 148}
WIDE_PAYS_FROM = {WIDE_64: 56, WIDE_128: 84, WARP_SPECIALIZED: 148}

#: Row tiles, and the most rows of an average expert for which each is taken: with room to spare where a second tile
#: would read the weights again, without where it finds them in the L2 cache (measured on an H100).
_ROW_TILES = {16: 12, 32: 24, 64: 64, 128: 2**31}

#: 16-bit tiles on asynchronous tensor cores, by accumulators. Of several of as many rows the first is taken of which
#: the device has room for all programs at once, so that none begins when others have ended, else the last. Chosen by
#: layers of nine shapes (PERFORMANCE.md, "Tile choice").
#: Swapped: 64 rows of weights times the tokens; the weights go from memory to the tensor cores past the registers.
_ASYNCHRONOUS: dict[int, _TilesOfRows] = {
    1: {
        16: ((64, 128, 6, True), (64, 128, 4, True), (64, 128, 3, True), (64, 64, 5, True)),
        32: ((64, 128, 4, True), (64, 64, 4, True)),
        64: ((64, 64, 5, True), (128, 64, 4, False)),
    },
    2: {
        16: ((32, 128, 4, True), (32, 128, 3, True), (32, 128, 5, True)),
        32: ((32, 64, 5, True),),
        64: ((64, 64, 4, False),),
    },
}
#: And those that differ where columns of the weights lie in one piece, of which a tile reads block_n.
_ASYNCHRONOUS_COLUMNS: dict[int, _TilesOfRows] = {
    1: {64: ((64, 64, 5, True), (256, 32, 4, False))},
    2: {
        16: ((32, 128, 4, True), (64, 64, 3, True)),
        32: ((32, 64, 5, True), (64, 64, 3, True)),
        64: ((128, 32, 4, False),),
    },
}
#: Bytes that every program takes of a multiprocessor's shared memory beside its own.
_RESERVED = 1024


@functools.cache
def tile_candidates(
    itemsize: int,
    num_columns: int,
    depth: int,
    num_accumulators: int,
    vectorized: bool,
    transposed: bool,
    limits: DeviceLimits,
) -> tuple[Tile, ...]:
    """One tile or several for each row count of ``_ROW_TILES``, within the device's registers and shared memory.

    Few rows: an expert's weights are read once, so short, deep tiles that keep many loads in flight. Many rows:
    tiles whose accumulators fill the register file (128 x 256 float32 over 8 warps), where the tensor cores leave the
    operands in shared memory.

    Args:
        itemsize: bytes of an operand's element.
        num_columns: columns of one accumulator's matrix; depth: of the product; num_accumulators: 2 for gate and up.
        vectorized: Triton loads both operands 16 bytes at once. Elements that are loaded one by one pass through
            registers, which bounds the tile.
        transposed: the weights' columns lie in one piece, not their rows.
    """
    tiles = []
    for block_m in _ROW_TILES:
        for tile in _of_rows(block_m, itemsize, depth, num_accumulators, vectorized, transposed, limits):
            while (
                shared_memory(tile, itemsize, num_accumulators) > limits.shared_memory and tile.num_stages > 2
            ):
                tile = tile._replace(num_stages=tile.num_stages - 1)
            while (
                shared_memory(tile, itemsize, num_accumulators) > limits.shared_memory and tile.block_k > 32
            ):
                tile = tile._replace(block_k=tile.block_k // 2)
            # Narrow matrices: no tile wider than the next power of two of the columns.
            block_n = max(16, min(tile.block_n, triton.next_power_of_2(num_columns)))
            tiles.append(tile._replace(block_n=block_n))
    return tuple(dict.fromkeys(tiles))


def _of_rows(
    block_m: int,
    itemsize: int,
    depth: int,
    num_accumulators: int,
    vectorized: bool,
    transposed: bool,
    limits: DeviceLimits,
) -> list[Tile]:
    if itemsize == 4:
        # IEEE float32 runs on the ordinary units: what bounds it is registers, not operand traffic.
        tile = Tile(block_m, 64, 32, 2, 4) if block_m <= 32 else Tile(64, 64, 16, 2, 8)
    elif not vectorized:
        tile = Tile(block_m, 64, 64 if block_m <= 32 else 32, 3, 8 if block_m == 128 else 4)
    elif limits.async_mma and block_m <= 64:
        own = _ASYNCHRONOUS_COLUMNS[num_accumulators] if transposed else {}
        return [
            Tile(block_m, block_n, block_k, num_stages, 4, swapped)
            for block_n, block_k, num_stages, swapped in own.get(
                block_m, _ASYNCHRONOUS[num_accumulators][block_m]
            )
        ]
    elif block_m <= 32:
        # A depth that ends within a block costs a mask on each load.
        tile = (
            Tile(block_m, 128, 64, 4, 4) if depth % 128 and depth % 64 == 0 else Tile(block_m, 64, 128, 4, 4)
        )
    elif block_m == 64:
        tile = Tile(block_m, 128, 64, 4, 4)
    else:
        tile = Tile(block_m, 256 if limits.async_mma else 128, 64, 3, 8)
    return [tile._replace(block_n=tile.block_n // num_accumulators)]


def shared_memory(tile: Tile, itemsize: int, num_accumulators: int) -> int:
    return tile.num_stages * tile.block_k * (tile.block_m + num_accumulators * tile.block_n) * itemsize


def warp_specialized_from(num_columns: int, num_experts: int, limits: DeviceLimits) -> Mapping[Tile, int]:
    """Rows of an average expert from which warp-specialized tiles are taken for products with ``num_columns`` rows of
    weights; those with less room only where a tile of each expert gives every multiprocessor one: with 8 experts of
    1536 and 2048, 64 tokens took 40.7 us with them and 38.4 without (H200, layer, two runs). Without them the one with
    more is taken from 128 rows on (measured on an H100). Wide ones by the same rule, where they hardly pad more rows:
    measured were those of gpt-oss, 3072 instead of 2944.
    """
    narrow = triton.cdiv(num_columns, WARP_SPECIALIZED.block_n)
    wide = triton.cdiv(num_columns, WIDE_128.block_n)
    pads_little = wide * WIDE_128.block_n <= 1.05 * narrow * WARP_SPECIALIZED.block_n
    if pads_little and num_experts * wide >= limits.multiprocessors:
        return WIDE_PAYS_FROM
    if num_experts * narrow >= limits.multiprocessors:
        return WARP_SPECIALIZED_PAYS_FROM
    return {WARP_SPECIALIZED: 128}


def choose_tile(
    candidates: tuple[Tile, ...],
    num_slots: int,
    num_experts: int,
    num_columns: int,
    itemsize: int,
    num_accumulators: int,
    special_from: Mapping[Tile, int],
    limits: DeviceLimits,
) -> Tile:
    """The row tile for the average expert's rows, as ``_ROW_TILES`` says (the largest candidate if that is smaller),
    and of several of as many rows the one for so many programs, as :func:`of_programs` says.

    Args:
        num_columns, itemsize, num_accumulators: as for :func:`tile_candidates`.
        special_from: warp-specialized tiles, which are taken from so many rows of an average expert on, if
            they are candidates; of several the one with the largest number.
    """
    reached = {tile: rows for tile, rows in special_from.items() if num_slots >= rows * num_experts}
    special = [tile for tile in candidates if tile in reached]
    if special:
        return max(special, key=lambda tile: reached[tile])
    candidates = tuple(tile for tile in candidates if not tile.warp_specialized)
    num_row_tiles = min(num_experts, num_slots)  # most experts have one
    average = num_slots / max(num_row_tiles, 1)
    rows = next(
        (tile.block_m for tile in candidates if average <= _ROW_TILES.get(tile.block_m, 0)),
        candidates[-1].block_m,
    )
    as_tall = tuple(tile for tile in candidates if tile.block_m == rows)
    return of_programs(as_tall, num_row_tiles, num_columns, itemsize, num_accumulators, limits)


def of_programs(
    tiles: tuple[Tile, ...],
    num_row_tiles: int,
    num_columns: int,
    itemsize: int,
    num_accumulators: int,
    limits: DeviceLimits,
) -> Tile:
    """Of tiles of as many rows the first all of whose programs the device has room for at once, else the last."""

    def at_once(tile: Tile) -> int:
        of_one = shared_memory(tile, itemsize, num_accumulators) + _RESERVED
        return limits.shared_memory // of_one * limits.multiprocessors

    fitting = (
        tile for tile in tiles if num_row_tiles * triton.cdiv(num_columns, tile.block_n) <= at_once(tile)
    )
    return next(fitting, tiles[-1])
