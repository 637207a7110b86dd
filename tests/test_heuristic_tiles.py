"""Which tile is taken where none was tuned, by the number of programs a device has room for."""

from __future__ import annotations

import pytest
import torch

from compile_moe.ops.kernels import tuned_tiles
from compile_moe.ops.kernels.gemm_problem import GemmProblem
from compile_moe.ops.kernels.heuristic_tiles import of_programs, shared_memory
from compile_moe.ops.kernels.quantized import tiles as quantized_tiles
from compile_moe.ops.kernels.tiles import DeviceLimits, Tile
from compile_moe.ops.quantized_format import weight_format
from compile_moe.quantization import make_scheme

HOPPER = DeviceLimits(232448, async_mma=True, warp_specialized=True, multiprocessors=132)
AMPERE = DeviceLimits(166912, async_mma=False, multiprocessors=108)


def problem(
    gemm: str, num_experts: int = 128, hidden: int = 2048, intermediate: int = 768, transposed: bool = False
) -> GemmProblem:
    layout = "ungated" if gemm == "scatter_gemm" else "interleaved" if transposed else "concatenated"
    sizes = num_experts, hidden, intermediate
    return GemmProblem(gemm, *sizes, "bfloat16", "16-bit", layout, transposed, True, True)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_tiles, "device_limits", lambda index: HOPPER if index == 0 else AMPERE)


GATHER, SCATTER = problem("gather_gemm"), problem("scatter_gemm")
FEW = problem("scatter_gemm", num_experts=8)
COLUMNS = problem("gather_gemm", 128, 2880, 2880, transposed=True)


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(
    ("posed", "slots", "expected"),
    [
        # 192, 384 and 1536 programs of 32 columns, of which 264, 396 and, again, 264 run at once.
        (GATHER, 8, Tile(16, 32, 128, 4, 4, True)),
        (GATHER, 16, Tile(16, 32, 128, 3, 4, True)),
        (GATHER, 64, Tile(16, 32, 128, 5, 4, True)),
        # 128, 256, 320 and 512 programs of 64 columns, of which 132, 264, 396 and 528 run at once.
        (SCATTER, 4, Tile(16, 64, 128, 6, 4, True)),
        (SCATTER, 8, Tile(16, 64, 128, 4, 4, True)),
        (SCATTER, 10, Tile(16, 64, 128, 3, 4, True)),
        (SCATTER, 16, Tile(16, 64, 64, 5, 4, True)),
        (SCATTER, 2048, Tile(32, 64, 64, 4, 4, True)),
        (SCATTER, 4096, Tile(64, 128, 64, 4, 4)),
        # As many row tiles as experts: 256 programs of 64 columns, however many slots.
        (FEW, 64, Tile(16, 64, 128, 4, 4, True)),
        (FEW, 160, Tile(32, 64, 128, 4, 4, True)),
        (FEW, 320, Tile(64, 64, 64, 5, 4, True)),
        # 360 programs of 32 columns.
        (COLUMNS, 4, Tile(16, 64, 64, 3, 4, True)),
        (COLUMNS, 2048, Tile(32, 64, 64, 3, 4, True)),
        (COLUMNS, 4096, Tile(64, 128, 32, 4, 4)),
        (COLUMNS._replace(intermediate_size=768), 8, Tile(16, 32, 128, 4, 4, True)),
    ],
)
def test_on_hopper(posed: GemmProblem, slots: int, expected: Tile) -> None:
    choice = tuned_tiles.heuristic_choice(posed, slots, 0)
    assert choice.tile == expected
    assert choice.tile in choice.candidates


@pytest.mark.usefixtures("on")
def test_one_tile_of_each_row_count_elsewhere() -> None:
    for posed in (GATHER, SCATTER, COLUMNS):
        candidates = tuned_tiles.heuristic_choice(posed, 8, 1).candidates
        assert [tile.block_m for tile in candidates] == [16, 32, 64, 128]
        assert not any(tile.swapped for tile in candidates)


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize("posed", [GATHER, SCATTER, FEW, COLUMNS], ids=str)
def test_every_number_of_slots_finds_a_tile_of_its_rows(posed: GemmProblem) -> None:
    candidates = tuned_tiles.heuristic_choice(posed, 1, 0).candidates
    for slots in (0, 1, 2, 7, 40, 300, 1025, 5000, 2**20):
        choice = tuned_tiles.heuristic_choice(posed, slots, 0)
        assert choice.candidates == candidates, "what is loaded must not depend on the number of slots"
        assert choice.tile in candidates
        average = slots / min(posed.num_experts, max(slots, 1))
        assert choice.tile.block_m >= min(average, 64)


def test_the_first_that_all_run_at_once() -> None:
    deep, shallow, small = (
        Tile(16, 64, 128, 4, 4, True),
        Tile(16, 64, 128, 3, 4, True),
        Tile(16, 64, 64, 5, 4, True),
    )
    assert [shared_memory(tile, 2, 1) for tile in (deep, shallow, small)] == [81920, 61440, 51200]
    tiles = deep, shallow, small

    def chosen(programs: int, limits: DeviceLimits) -> Tile:
        return of_programs(tiles, programs, 64, 2, 1, limits)

    assert [chosen(n, HOPPER) for n in (1, 264, 265, 396, 397, 10**6)] == [
        deep,
        deep,
        shallow,
        shallow,
        small,
        small,
    ]
    # Half as many multiprocessors; and less shared memory, in which one program of the deep tile has room.
    assert [chosen(n, HOPPER._replace(multiprocessors=66)) for n in (132, 133)] == [deep, shallow]
    assert [chosen(n, HOPPER._replace(shared_memory=140000)) for n in (132, 133, 264, 265)] == [
        deep,
        shallow,
        shallow,
        small,
    ]


@pytest.mark.parametrize(
    ("slots", "rows", "num_stages"),
    # Of 64 columns each; 528 programs of 16 rows and five stages run at once, 396 of 32 rows.
    [(1, 16, 5), (16, 16, 5), (17, 16, 3), (1000, 16, 3), (2000, 32, 3)],
)
def test_eight_bits(slots: int, rows: int, num_stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_tiles, "device_limits", lambda index: HOPPER)
    x, w = (
        torch.empty(*shape, dtype=torch.int8, device="meta") for shape in ((slots, 768), (128, 2048, 768))
    )
    out = torch.empty(slots, 2048, dtype=torch.bfloat16, device="meta")
    form = weight_format(make_scheme("int8_w8a8_channel").text)
    choice = quantized_tiles.tile_choice(x, w, torch.empty(128, 2048, 1, device="meta"), out, form, False)
    assert choice.tile == Tile(rows, 64, 128, num_stages, 4)
    assert choice.tile in choice.candidates
