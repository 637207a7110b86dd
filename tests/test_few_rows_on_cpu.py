"""The kernels of few rows an expert, whose language has no interpreter, computed by torch: numbers, indices, bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from compile_moe.ops.kernels.quantized.few_rows.launches import NARROW, WIDE
from compile_moe.ops.kernels.quantized.few_rows.multiply import fewest_tokens, takes
from compile_moe.ops.kernels.tiles import Tile
from tests.support import gluon_on_cpu
from tests.support.few_rows_on_cpu import few_rows_on_cpu, kernels_launched
from tests.support.launchers import launch
from tests.support.quantized import make_quantized
from tests.support.quantized_gemms import GEMMS, Gemms
from tests.support.quantized_inputs import op
from tests.test_few_rows import ROWS, VARIANTS, name, with_rows

#: Experts' rows on average: 1, with narrow tiles in GEMM 1 and in GEMM 2; 4, 10, 30, and these with narrow tiles in one
#: of the GEMMs. Depths that end in a step, or are less than one; columns that end in a tile.
SIZES: dict[str, dict[str, Any]] = {
    "narrow GEMM 1": {"M": 1, "K": 2592, "I": 144, "E": 8},
    "narrow GEMM 2": {"M": 2, "K": 96, "I": 2624, "E": 8},
    "8 rows": {"M": 15, "K": 544, "I": 96, "E": 8, "routing": "empty", "activation": "swigluoai"},
    "16 rows": {"M": 20, "K": 96, "I": 1312, "E": 4, "skipped": True, "activation": "relu2_no_mul"},
    "32 rows": {"M": 60, "K": 288, "I": 160, "E": 4},
    "narrow, 16 rows": {"M": 10, "K": 16672, "I": 32, "E": 2},
    "narrow, 32 rows": {"M": 30, "K": 32, "I": 16672, "E": 2, "activation": "relu2_no_mul"},
}
#: Of both GEMMs: every tile is among them.
TILES_OF = {
    "narrow GEMM 1": (NARROW[0], WIDE[0]),
    "narrow GEMM 2": (WIDE[0], NARROW[0]),
    "8 rows": (WIDE[0], WIDE[0]),
    "16 rows": (WIDE[1], WIDE[1]),
    "32 rows": (WIDE[2], WIDE[2]),
    "narrow, 16 rows": (NARROW[1], WIDE[1]),
    "narrow, 32 rows": (WIDE[2], NARROW[2]),
}


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with few_rows_on_cpu():
        yield


def assert_right(variant: str, dtype: torch.dtype = torch.bfloat16, **layer: Any) -> list[tuple[int, int]]:
    return tiles_of(Gemms(make_quantized(VARIANTS[variant], topk=2, dtype=dtype, **layer)))


def tiles_of(gemms: Gemms) -> list[tuple[int, int]]:
    """Of both GEMMs, by these kernels and right: rows and warps."""
    kernels_launched.clear()
    for stage in GEMMS:
        gemms.check(stage, launch(op(stage), *gemms.inputs[stage]))
    assert [kernel for kernel, _ in kernels_launched] == list(map(name, GEMMS))
    return [(constants["BLOCK_M"], constants["WARPS"]) for _, constants in kernels_launched]


# Narrow tiles for more rows than one have the longest depths.
DEEP = ("int8_w8a16", "int4, zero points", "mxfp4_w4a16")


@pytest.mark.parametrize(
    "variant, size",
    [(variant, size) for variant in VARIANTS for size in SIZES if "narrow, " not in size or variant in DEEP],
)
def test_gemms(variant: str, size: str) -> None:
    tiles = assert_right(variant, **SIZES[size], biased=True)
    assert tiles == [(tile.block_m, tile.num_warps) for tile in TILES_OF[size]]


@pytest.mark.parametrize("tile, rows", ROWS.items())
@pytest.mark.parametrize("variant", ["int4, zero points", "int8_w8a16"])
def test_tiles_that_are_half_full_or_less(variant: str, tile: int, rows: list[int]) -> None:
    gemms = with_rows(rows, VARIANTS[variant], K=544, I=96, biased=True)
    assert tiles_of(gemms) == [(tile, 4)] * 2


@pytest.mark.parametrize("tile", WIDE)
def test_a_tile_is_multiplied_with_the_fewest_tokens_that_hold_its_rows(tile: Tile) -> None:
    block_m = tile.block_m
    numbers = sorted({fewest_tokens.fn(block_m), block_m})
    assert numbers == {8: [8], 16: [8, 16], 32: [16, 32]}[block_m]
    taken = gluon_on_cpu.on_cpu(takes, gluon_on_cpu.Program(), {})
    for rows in range(1, block_m + 1):
        used = [tokens for tokens in numbers if taken(rows, tokens, block_m)]
        assert used == [next(tokens for tokens in numbers if tokens >= rows)]


@pytest.mark.parametrize("variant", ["int4, zero points", "int8_w8a16"])
def test_float16(variant: str) -> None:
    assert_right(variant, torch.float16, M=9, K=160, I=96, E=4)


@pytest.mark.parametrize("variant", ["mxfp4_w4a16", "int8, zero points"])
def test_all_on_one_expert(variant: str) -> None:
    assert_right(variant, M=40, K=256, I=128, E=4, routing="one")


@pytest.mark.parametrize("tokens, tile", [(6, 8), (20, 16), (40, 32)])
@pytest.mark.parametrize(
    "offsets", [[0, 90, 3, -5, 7], [7, 6, 5, 4, 3], [-(2**31), 2**31 - 1, 2, 99, -1]], ids=str
)
def test_offsets_that_make_no_sense_lead_nowhere(offsets: list[int], tokens: int, tile: int) -> None:
    """Loads and stores outside a tensor fail here."""
    layer = {"M": tokens, "K": 96, "I": 96, "E": 4, "topk": 2}
    gemms = Gemms(make_quantized(VARIANTS["int4_w4a16"], **layer, dtype=torch.bfloat16))
    slots = torch.tensor([5, -1, 99, 2**31 - 1, -(2**31), 0, 3, 4, 1, 7, 9, 2], dtype=torch.int32)
    kernels_launched.clear()
    for stage in GEMMS:
        arguments = list(gemms.inputs[stage])
        arguments[6] = torch.tensor(offsets, dtype=torch.int32)
        arguments[5] = slots.repeat(-(-2 * tokens // 12))[: 2 * tokens]
        launch(op(stage), *arguments)
    assert [constants["BLOCK_M"] for _, constants in kernels_launched] == [tile] * 2
