"""The choice of a tile: a tuned one where the user tuned this GEMM on this device, else the heuristic's."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch

from compile_moe.ops.kernels.gemm_problem import GemmProblem, Shape
from compile_moe.ops.kernels.heuristic_tiles import (
    choose_tile,
    tile_candidates,
    warp_specialized_from,
)
from compile_moe.ops.kernels.launch import Launch, Plan
from compile_moe.ops.kernels.tile_file import TunedTiles, file_name, parse, tiles_folder
from compile_moe.ops.kernels.tile_space import why_not
from compile_moe.ops.kernels.tiles import WARP_SPECIALIZED_FROM, Tile, device_limits

#: Tuned tiles serve numbers of slots that differ from the tuned one by at most this factor.
_REACH = 2


_reported: set[str] = set()


class TunedTilesWarning(UserWarning):
    """A file of tuned tiles is ignored. Results are right, but may come slower."""


class TileChoice(NamedTuple):
    """A tile, and all that other numbers of slots would choose for the same problem.

    fewer_are_special: fewer slots may choose a warp-specialized tile, and these don't.
    """

    tile: Tile
    candidates: tuple[Tile, ...]
    fewer_are_special: bool = False


def tile_choice(problem: GemmProblem, num_slots: int, device_index: int | None) -> TileChoice:
    """The tile for ``num_slots`` rows. The candidates of a problem don't change while the process runs."""
    by_heuristic = heuristic_choice(problem, num_slots, device_index)
    tuned = _tuned_tiles(problem, device_index)
    nearest = _nearest(tuned, num_slots)
    special_from = WARP_SPECIALIZED_FROM * problem.num_experts
    if nearest and nearest.warp_specialized and num_slots < special_from:
        nearest = None
    tile = nearest or by_heuristic.tile
    fewer_are_special = num_slots >= special_from and (
        by_heuristic.tile.warp_specialized
        or any(each.warp_specialized and slots <= _REACH * num_slots for slots, each in tuned.items())
    )
    return TileChoice(
        tile,
        tuple(dict.fromkeys([*by_heuristic.candidates, *tuned.values()])),
        fewer_are_special and not tile.warp_specialized,
    )


def heuristic_choice(problem: GemmProblem, num_slots: int, device_index: int | None) -> TileChoice:
    """What :func:`tile_choice` returns where nothing was tuned."""
    limits = device_limits(device_index)
    candidates = tile_candidates(
        problem.itemsize,
        problem.num_columns,
        problem.depth,
        problem.num_accumulators,
        problem.vectorized,
        problem.transposed,
        limits,
    )
    special_from = warp_specialized_from(
        problem.num_columns * problem.num_accumulators, problem.num_experts, limits
    )
    candidates += tuple(tile for tile in special_from if not why_not(tile, problem, limits))
    sizes = problem.num_columns, problem.itemsize, problem.num_accumulators
    tile = choose_tile(candidates, num_slots, problem.num_experts, *sizes, special_from, limits)
    return TileChoice(tile, candidates)


def plan_of(
    key: tuple[Hashable, ...],
    choice: TileChoice,
    launches_for: Callable[[Tile], tuple[Launch, ...]],
) -> Plan:
    """Launches with the chosen tile. The warp-specialized kernels, which take seconds to compile, load with the first
    call of so many rows that it needs them, or fewer would; the others with any call.
    """

    def plan(warp_specialized: bool, launches: tuple[Launch, ...] = ()) -> Plan:
        def variants() -> list[Launch]:
            tiles = [each for each in choice.candidates if each.warp_specialized == warp_specialized]
            return [launch for each in tiles for launch in launches_for(each)]

        return Plan((*key, warp_specialized), launches, variants)

    launches = launches_for(choice.tile)
    if choice.tile.warp_specialized:
        return plan(True, launches)._replace(others=(plan(False),))
    if choice.fewer_are_special:
        return plan(False, launches)._replace(others=(plan(True),))
    costly = any(each.warp_specialized for each in choice.candidates)
    return plan(False, launches)._replace(costly_others=(plan(True),) if costly else ())


def device_name(device_index: int | None) -> str | None:
    """What files of tuned tiles call a device; None where kernels are interpreted."""
    return None if device_index is None else torch.cuda.get_device_name(device_index)


def _nearest(tuned: Mapping[int, Tile], num_slots: int) -> Tile | None:
    def factor(slots: int) -> float:
        return max(slots, num_slots) / max(1, min(slots, num_slots))

    nearest = min(tuned, key=factor, default=None)
    return None if nearest is None or factor(nearest) > _REACH else tuned[nearest]


def _tuned_tiles(problem: GemmProblem, device_index: int | None) -> Mapping[int, Tile]:
    tuned, trouble = _read(problem.shape, device_index)
    if trouble and trouble not in _reported:
        _reported.add(trouble)
        _warn(trouble)
    return tuned.get(problem, {})


@functools.cache
def _read(shape: Shape, device_index: int | None) -> tuple[TunedTiles, str]:
    """The file for a shape and a device, and what is wrong with it; read once in a process: graphs rely on the tiles
    that were loaded.
    """
    folder, device = tiles_folder(), device_name(device_index)
    if folder is None or device is None:
        return {}, ""
    path = folder
    try:
        if not folder.is_dir():
            return {}, ""
        path = folder / file_name(device, shape)
        if not path.exists():
            others = f"{path.stem.rpartition('-')[0]}-*.json"
            if any(folder.glob(others)):
                return {}, (
                    f"no tuned tiles for these versions of torch, triton and compile_moe in {folder}, but for others "
                    f"({others})"
                )
            return {}, ""
        return parse(path.read_text(encoding="utf-8"), device, shape, device_limits(device_index)), ""
    except (OSError, ValueError) as error:  # of JSON and of UTF-8, too
        return {}, f"{path} is ignored, because it can't be read or doesn't hold what it should: {error}"


def _warn(what: str) -> None:
    warnings.warn(
        f"compile_moe: {what}; tiles are chosen without it. To tune again, run compile-moe tune; to look for no such "
        "file, set COMPILE_MOE_TILES to an empty string",
        TunedTilesWarning,
        stacklevel=3,
    )
