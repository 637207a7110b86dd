"""Where the search of ``compile-moe tune`` goes in the tiles of a real shape, and how few of them it measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from compile_moe.cli.tune_journal import Journal
from compile_moe.cli.tune_search import search
from compile_moe.cli.tune_steps import neighbours, starts
from compile_moe.ops.kernels.gemm_problem import GemmProblem
from compile_moe.ops.kernels.tile_space import tile_space
from compile_moe.ops.kernels.tiles import DeviceLimits, Tile

PROBLEM = GemmProblem("gather_gemm", 8, 2048, 768, "bfloat16", "16-bit", "concatenated", False, True, True)
LIMITS = DeviceLimits(232448, async_mma=True, warp_specialized=True)


class FakeCase:
    """Times grow with the distance from one tile."""

    def __init__(self, num_slots: int) -> None:
        self.problem, self.num_slots = PROBLEM, num_slots
        self.measured: set[Tile] = set()
        self._tiles = tile_space(PROBLEM, num_slots, LIMITS)
        self.heuristic_tile = self._tiles[1]
        self.fastest = self._tiles[-1]

    def tiles(self) -> tuple[Tile, ...]:
        return self._tiles

    def compile(self, tiles: Sequence[Tile]) -> None:
        pass

    def measure(self, tile: Tile) -> tuple[float, ...]:
        self.measured.add(tile)
        away = (abs(math.log2(1 + a) - math.log2(1 + b)) for a, b in zip(tile, self.fastest, strict=True))
        return (1.0 + sum(away),)


@pytest.mark.parametrize("num_slots", [8, 4096])
def test_the_fastest_is_found_among_few(num_slots: int, tmp_path: Path) -> None:
    case = FakeCase(num_slots)
    with closing(Journal(tmp_path / "journal")) as journal:
        found = search(case, journal, lambda *_: None)
    assert found.tile == case.fastest
    assert case.measured <= set(case.tiles())
    assert len(case.measured) < len(case.tiles()) / 4, (len(case.measured), len(case.tiles()))


def test_steps() -> None:
    tiles = tile_space(PROBLEM, 4096, LIMITS)
    begun = starts(tiles[-1], tiles)
    assert begun[0] == tiles[-1] and len(set(begun)) == len(begun) and set(begun) <= set(tiles)
    assert {tile.block_m for tile in begun} == {tile.block_m for tile in tiles}
    special = {(tile.block_m, tile.block_n) for tile in tiles if tile.warp_specialized}
    assert special == {(tile.block_m, tile.block_n) for tile in begun if tile.warp_specialized}
    assert {(128, 128), (128, 256)} < special
    for tile in begun:
        for near in neighbours(tile, tiles):
            assert near in tiles and tile in neighbours(near, tiles)
            differing = {name for name, a, b in zip(Tile._fields, tile, near, strict=True) if a != b}
            assert differing and len(differing - {"num_warps"}) <= 1
