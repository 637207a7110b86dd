"""Row tiles of the GEMMs for few rows: every row in one tile of its expert, in bounds whatever the offsets say."""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl

from compile_moe.ops.kernels.launch import Launch, Plan
from compile_moe.ops.kernels.launch import launch as run
from compile_moe.ops.kernels.tiles import MOST_TILES_OF_ROWS, locate_tile, max_row_tiles

FEW = MOST_TILES_OF_ROWS.value


@triton.jit
def locate_kernel(
    out_ptr,
    offsets_ptr,
    num_slots,
    num_experts,
    E_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WITH_SKIPPED: tl.constexpr,
):
    tile = tl.program_id(0)
    expert, first, end = locate_tile(offsets_ptr, tile, num_slots, num_experts, E_POW2, BLOCK_M, WITH_SKIPPED)
    tl.store(out_ptr + 3 * tile, expert)
    tl.store(out_ptr + 3 * tile + 1, first)
    tl.store(out_ptr + 3 * tile + 2, end)


def located(offsets: list[int], num_slots: int, block_m: int, with_skipped: bool) -> list[list[int]]:
    """Expert, first and end row of the tiles that there are."""
    e = len(offsets) - 1
    count = max_row_tiles(num_slots, e + with_skipped, block_m)
    out = torch.full((count, 3), -7, dtype=torch.int32)
    args = (out, torch.tensor(offsets, dtype=torch.int32), num_slots, e)
    options = {
        "E_POW2": triton.next_power_of_2(e + 1),
        "BLOCK_M": block_m,
        "WITH_SKIPPED": with_skipped,
        "num_warps": 4,
    }
    run(lambda *_: Plan((), (Launch(locate_kernel, (count,), args, options),), tuple), out)
    tiles: list[list[int]] = out.tolist()
    return [tile for tile in tiles if tile[0] <= e]


def few_counts(seed: int, num_experts: int, num_slots: int) -> list[int]:
    generator = random.Random(seed)
    counts = [0] * num_experts
    for _ in range(num_slots):
        counts[generator.randrange(num_experts) // generator.choice([1, 9])] += 1
    return counts


COUNTS = {
    "one row": [0, 0, 1, 0],
    "all on one expert": [0] * 9 + [60] + [0] * 90,
    "as many as experts": few_counts(0, 40, 40),
    "most": few_counts(1, 100, FEW),
    "more than that": few_counts(2, 100, FEW + 1),
    "more than experts": few_counts(3, 30, 31),
    "many": [70, 0, 3, 129],
}


@pytest.mark.parametrize(
    "case, block_m, with_skipped",
    [
        ("one row", 16, False),
        ("all on one expert", 16, True),
        ("all on one expert", 64, False),
        ("as many as experts", 16, False),
        ("most", 32, True),
        ("more than that", 16, True),
        ("more than experts", 16, False),
        ("many", 64, True),
    ],
)
def test_every_row_is_in_one_tile(case: str, block_m: int, with_skipped: bool) -> None:
    offsets = [0]
    for count in COUNTS[case]:
        offsets.append(offsets[-1] + count)
    num_slots = offsets[-1] + 3  # skipped ones
    rows: list[int] = []
    for expert, first, end in located(offsets, num_slots, block_m, with_skipped):
        assert [offsets, [*offsets, num_slots]][with_skipped][expert + 1] == end
        assert (first - offsets[expert]) % block_m == 0
        rows += range(first, min(end, first + block_m))
    assert sorted(rows) == list(range(num_slots if with_skipped else offsets[-1]))


@pytest.mark.parametrize("num_slots", [5, FEW + 9])
@pytest.mark.parametrize(
    "offsets",
    [[4, 3, 2, 1], [-(2**31), 2**31 - 1, 2, 9999]],
    ids=str,
)
def test_tiles_stay_in_bounds_whatever_the_offsets_say(offsets: list[int], num_slots: int) -> None:
    offsets = offsets + offsets[1:] * 21
    for expert, first, end in located(offsets, num_slots, 16, True):
        assert 0 <= expert < len(offsets) and 0 <= first < end <= num_slots
