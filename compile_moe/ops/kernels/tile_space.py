"""The tiles that a GEMM may run with: what the tuner measures, and what a file of tuned tiles may hold."""

from __future__ import annotations

import itertools
from typing import Any

import triton

from compile_moe.ops.kernels.gemm_problem import GemmProblem
from compile_moe.ops.kernels.heuristic_tiles import shared_memory
from compile_moe.ops.kernels.tiles import (
    SIXTEEN_BIT_TILES,
    WARP_SPECIALIZED_FROM,
    DeviceLimits,
    Tile,
)

#: Values of each field of a tile; a field that is not named here keeps its default.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128, 256),
    "num_stages": (2, 3, 4, 5, 6),
    "num_warps": (4, 8),
    "swapped": (False, True),
}
#: Bytes of shared memory beside the operands: barriers, where tensor cores are asynchronous.
_BARRIERS = 1024


def why_not(tile: Tile, problem: GemmProblem, limits: DeviceLimits) -> str:
    """Why a GEMM can't run with ``tile`` on a device with these limits, or would only spill; "" if it can."""
    if tile.warp_specialized:
        if tile not in SIXTEEN_BIT_TILES:
            return f"a warp-specialized tile must be one of {SIXTEEN_BIT_TILES}, got {tile}"
        if not (limits.warp_specialized and problem.has_boxes):
            return f"{tile} needs 16-bit operands that the tensor memory accelerator can read, on sm_90"
        return ""
    for field, value in tile._asdict().items():
        if value not in (accepted := _values(field)):
            return f"{field} must be of {', '.join(map(str, accepted))}, got {value}"
    rows_and_columns = tile.block_m + problem.num_accumulators * tile.block_n
    accumulators = problem.num_accumulators * tile.block_m * tile.block_n
    num_threads = 32 * tile.num_warps
    for what, amount, most in (
        (
            "bytes of shared memory",
            shared_memory(tile, problem.itemsize, problem.num_accumulators) + _BARRIERS,
            limits.shared_memory,
        ),
        # Without asynchronous tensor cores the operands need registers, too.
        ("accumulators a thread", accumulators // num_threads, 200 if limits.async_mma else 128),
        (
            "elements that a thread loads one by one or rounds",
            0
            if problem.vectorized and problem.itemsize < 4
            else tile.block_k * rows_and_columns // num_threads,
            64,
        ),
        (
            "multiplications that a thread writes out",
            accumulators * tile.block_k // num_threads if problem.precision == "ieee" else 0,
            1024,
        ),
    ):
        if amount > most:
            return f"{tile} needs {amount} {what}, and there may be {most}"
    if tile.swapped and not (limits.async_mma and problem.vectorized and problem.itemsize < 4):
        return f"{tile} is swapped, which needs 16-bit operands loaded 16 bytes at once, on sm_90 or sm_100"
    if tile.swapped and tile.block_m > 64:
        return f"{tile} is swapped, which needs a block_m of at most 64"
    return ""


def tile_space(problem: GemmProblem, num_slots: int, limits: DeviceLimits) -> tuple[Tile, ...]:
    """Every tile worth measuring for ``num_slots`` rows."""
    average = num_slots / max(1, min(problem.num_experts, num_slots))
    widest = max(16, triton.next_power_of_2(problem.num_columns))
    deepest = max(32, triton.next_power_of_2(problem.depth))
    tiles = (Tile(*values) for values in itertools.product(*map(_values, Tile._fields)))
    special = SIXTEEN_BIT_TILES if average >= WARP_SPECIALIZED_FROM else ()
    return tuple(tile for tile in special if not why_not(tile, problem, limits)) + tuple(
        tile
        for tile in tiles
        # Shorter tiles read the weights too often, taller ones compute rows that are not there.
        if min(average / 16, 64) <= tile.block_m <= 4 * max(average, 16)
        and tile.block_n * problem.num_accumulators >= min(32, widest)
        and tile.block_n <= widest
        and tile.block_k <= deepest
        and (tile.block_k >= 32 or problem.precision == "ieee")
        # Asynchronous tensor cores take 64 rows of their left operand.
        and (not tile.swapped or tile.block_n * problem.num_accumulators >= 64)
        and not why_not(tile, problem, limits)
    )


def _values(field: str) -> tuple[Any, ...]:
    return _CHOICES.get(field) or (Tile._field_defaults[field],)
