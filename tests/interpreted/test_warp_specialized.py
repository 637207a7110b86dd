"""What the warp-specialized GEMMs walk: every row in one tile, every tile in one group, within bounds."""

from __future__ import annotations

import functools
import itertools
import random
from types import FunctionType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from compile_moe.ops.kernels.launch import Plan
from compile_moe.ops.kernels.launch import launch as run
from compile_moe.ops.kernels.warp_specialized import ring, row_tiles, zero_skipped
from compile_moe.ops.kernels.warp_specialized.ring import COLUMNS
from compile_moe.ops.kernels.warp_specialized.row_tiles import GROUP, MERGED, ROWS, TAIL

EDGES = [
    0,
    1,
    32,
    33,
    64,
    96,
    97,
    128,
    129,
    192,
    256,
    257,
    288,
    289,
    320,
    512,
    513,
    545,
    577,
    0,
    863,
    865,
    2600,
]
RANDOM = [[random.Random(seed).randint(0, 1500) for _ in range(7 * seed + 1)] for seed in range(4)]


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


@functools.cache
def tiles_of(*counts: int) -> list[list[int]]:
    return list_tiles(offsets_of(list(counts)), sum(counts))


def list_tiles(offsets: Tensor, num_slots: int, num_rows: int = ROWS) -> list[list[int]]:
    num_experts = len(offsets) - 1
    slots = torch.zeros(num_slots, dtype=torch.int32)
    tiles = row_tiles.scratch(slots, num_experts).fill_(-7)
    launch = row_tiles.launch_for(num_rows, tiles, offsets, num_slots, num_experts)
    run(lambda *_: Plan((), (launch,), tuple), tiles)
    count = int(tiles[0])
    assert tiles[1] == 0, "none is taken yet"
    entries: list[list[int]] = tiles[4:].view(-1, 4).tolist()
    assert 0 <= count <= len(entries)
    return entries[:count] or entries[:1]


@pytest.mark.parametrize("num_rows", [64, 128, 256])
@pytest.mark.parametrize("counts", [EDGES, [300], [1] * 40, [0, 0, 5000, 0], *RANDOM], ids=len)
def test_tiles_cover_every_row_once(counts: list[int], num_rows: int) -> None:
    num_slots = sum(counts) + 5  # the last ones are skipped
    tiles = list_tiles(offsets_of(counts), num_slots, num_rows)
    next_row = {e: start for e, start in enumerate(offsets_of(counts)[:-1].tolist())}
    for expert, first, rows, _ in tiles:
        assert first == next_row[expert] and 0 < rows <= num_rows + TAIL
        next_row[expert] += rows
    assert list(next_row.values()) == offsets_of(counts)[1:].tolist()
    order = dict.fromkeys(tile[0] for tile in tiles)
    assert [counts[e] for e in order] == sorted(filter(None, counts), reverse=True), "most rows first"
    for e, count in enumerate(counts):
        merged = 0 < count % num_rows <= min(MERGED, count // num_rows * TAIL)
        expected = count // num_rows + (count % num_rows > 0 and not merged)
        assert sum(tile[0] == e for tile in tiles) == expected


def find_tile(tiles: list[list[int]], tile: int, num_row_tiles: int, num_n: int) -> list[int]:
    """What the kernels' own function finds in a list: plain arithmetic, though Gluon has no interpreter."""
    memory = [num_row_tiles, -7, -7, -7, *itertools.chain.from_iterable(tiles)]
    language = SimpleNamespace(maximum=max, minimum=min, load=lambda address: memory[address])
    names = {"gl": language, "COLUMNS": COLUMNS.value}
    function = FunctionType(ring.find_tile.fn.__code__, names)
    return list(function(0, tile, num_row_tiles, num_n))


@pytest.mark.parametrize("num_columns", [1, 3, 12, 16, 17, 40])
@pytest.mark.parametrize("counts", [EDGES, [9000], *RANDOM[1:]], ids=len)
def test_every_row_tile_meets_every_column_tile_once(counts: list[int], num_columns: int) -> None:
    tiles = tiles_of(*counts)
    total = len(tiles) * num_columns
    found = [find_tile(tiles, tile, len(tiles), num_columns) for tile in range(total + 3)]
    assert {tuple(each) for each in found} == {
        (*tile[:3], column) for tile in tiles for column in range(num_columns)
    }
    assert found[total:] == [found[total - 1]] * 3, "programs look beyond the end"
    # A wave's tiles share rows and columns: COLUMNS of a row tile, then the next row tile of its group.
    assert [each[3] for each in found[: min(num_columns, COLUMNS.value)]] == list(
        range(min(num_columns, COLUMNS.value))
    )
    for _, _, _, group in tiles:
        assert 1 <= group & 255 <= GROUP


@pytest.mark.parametrize("num_tiles", [0, 1, 7, 14, 15, 100])
def test_programs_take_every_tile_once(num_tiles: int) -> None:
    """As the producers do, whichever is ready first."""
    num_programs, memory = 7, [num_tiles, 0, -7, -7]

    def atomic_add(address: int, value: int, sem: str) -> int:
        memory[address] += value
        return memory[address] - value

    language = SimpleNamespace(num_programs=lambda axis: num_programs, atomic_add=atomic_add)
    take_tile = FunctionType(ring.take_tile.fn.__code__, {"gl": language})
    ready = [(program, program + num_programs) for program in range(num_programs)]
    taken = []
    while ready:
        tile, next_tile = ready.pop(random.Random(len(taken)).randrange(len(ready)))
        if tile < num_tiles:
            taken.append(tile)
            ready.append((next_tile, take_tile(0)))
    assert sorted(taken) == list(range(num_tiles))


def test_no_rows_give_one_empty_tile() -> None:
    assert list_tiles(offsets_of([0, 0, 0]), 700) == [[0, 0, 0, 1]]


@pytest.mark.parametrize(
    "offsets", [[0, 900, 3, -5], [700, 600, 5, 4], [-(2**31), 2**31 - 1, 2, 9999]], ids=str
)
def test_tiles_stay_in_bounds_whatever_the_sort_says(offsets: list[int]) -> None:
    for num_rows in (64, 128, 256):
        for expert, first, rows, _ in list_tiles(torch.tensor(offsets, dtype=torch.int32), 700, num_rows):
            assert 0 <= expert < 3 and first >= 0 and 0 <= rows <= num_rows + TAIL and first + rows <= 700


@pytest.mark.parametrize("scattered", [False, True])
def test_rows_of_skipped_slots_are_zeroed(scattered: bool) -> None:
    num_slots, skipped = 70, 37
    slots = torch.randperm(num_slots, dtype=torch.int32)
    offsets = torch.tensor([0, 10, num_slots - skipped], dtype=torch.int32)
    out = torch.full((num_slots, 600), torch.nan)
    launch = zero_skipped.launch_for(out, slots, offsets, 2, scattered)
    run(lambda *_: Plan((), (launch,), tuple), out)
    rows = slots[-skipped:].long() if scattered else torch.arange(num_slots - skipped, num_slots)
    zeroed = torch.zeros(num_slots, dtype=torch.bool).index_fill_(0, rows, True)
    assert (out[zeroed] == 0).all() and out[~zeroed].isnan().all()
