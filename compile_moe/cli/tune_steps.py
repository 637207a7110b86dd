"""Steps between tiles: where the search of ``compile-moe tune`` begins, and where it can go from a tile."""

from __future__ import annotations

from collections.abc import Sequence

from compile_moe.ops.tuning import Tile


def starts(first: Tile, tiles: Sequence[Tile]) -> list[Tile]:
    """``first``, and the tile most like it of each number of rows, swapped or not, and, of warp-specialized ones, of
    each number of rows and columns.
    """
    steps = _Steps(tiles)
    nearest: dict[tuple[int, bool, int], Tile] = {}
    for tile in sorted(tiles, key=lambda tile: sum(steps.between(first, tile))):
        columns = tile.block_n if tile.warp_specialized else 0
        nearest.setdefault((tile.block_m, tile.swapped, columns), tile)
    return list(dict.fromkeys([first, *nearest.values()]))


def neighbours(tile: Tile, tiles: Sequence[Tile]) -> list[Tile]:
    """Those of ``tiles`` that are one step away: one field has the next value that occurs; or two fields have, of which
    one is the number of warps.
    """
    steps = _Steps(tiles)
    warps = Tile._fields.index("num_warps")

    def is_near(other: Tile) -> bool:
        between = steps.between(tile, other)
        return max(between) == 1 and sum(between) - between[warps] <= 1

    return [other for other in tiles if is_near(other)]


class _Steps:
    """Of each field, the values that occur, in order."""

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self._ranks = [
            {value: i for i, value in enumerate(sorted(set(values)))} for values in zip(*tiles, strict=True)
        ]

    def between(self, a: Tile, b: Tile) -> list[int]:
        return [abs(rank[x] - rank[y]) for rank, x, y in zip(self._ranks, a, b, strict=True)]
