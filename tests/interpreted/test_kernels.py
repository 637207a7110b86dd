"""The real kernels, interpreted: every hostile layer, out-of-bounds accesses raise, unwritten memory is NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe.ops import act_and_mul, gather_gemm, scatter_gemm, sort_tokens, weight_and_reduce
from compile_moe.ops.fused_moe import weight_input
from compile_moe.ops.kernels import heuristic_tiles
from compile_moe.ops.kernels import sort_tokens as sort_kernels
from compile_moe.ops.named_activations import NAMES, program_text
from compile_moe.ops.sort_tokens import sort_tokens_torch
from tests.support.launchers import launch
from tests.support.oracle import ACTIVATIONS, CASES, Layer, assert_as_accurate, make_layer


def run_layer(layer: Layer, *, zero_skipped: bool = False) -> Tensor:
    """The layer through the launchers, as the ops call them on CUDA."""
    x, w1, w2, weights, ids = layer.args
    on_input = layer.apply_router_weight_on_input
    if on_input:
        x = weight_input(x, weights)
    m, topk = ids.shape
    slots, offsets = launch(sort_tokens, ids, w1.size(0), layer.expert_map)
    rows = launch(
        gather_gemm, x, w1, slots, offsets, topk, layer.w1_bias, program_text(layer.activation), zero_skipped
    )
    out = launch(scatter_gemm, rows, w2, slots, offsets, m, topk, layer.w2_bias, zero_skipped)
    mask = () if zero_skipped else (ids, layer.expert_map, w1.size(0))
    return launch(weight_and_reduce, out, weights, *(mask or (None, None, -1)), not on_input)


# Rows and columns are the same in bfloat16, but for what is loaded and rounded.
IN_BF16 = ("plain", "odd", "transposed-biased-swigluoai", "skipped-mapped", "weights-in-hidden-dtype")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), *((case, torch.bfloat16) for case in IN_BF16)],
    ids=str,
)
def test_layer(case: str, dtype: torch.dtype) -> None:
    # Each expert with tokens takes programs of its own.
    fewer = {"M": 4} if case == "many-experts" else {}
    layer = make_layer(**CASES[case] | fewer, dtype=dtype)
    assert_as_accurate(run_layer(layer), layer)


@pytest.mark.parametrize("case", ["skipped", "skipped-mapped", "mapped"])
def test_skipped_slots_are_zeroed_on_request(case: str) -> None:
    """Without the mask of finalize, the zeros of GEMM 2 stand for skipped slots."""
    layer = make_layer(**CASES[case])
    assert_as_accurate(run_layer(layer, zero_skipped=True), layer)


@pytest.mark.parametrize("name", NAMES)
def test_activation_in_the_epilogue(name: str) -> None:
    layer = make_layer(M=5, activation=name, dtype=torch.float32)
    assert_as_accurate(run_layer(layer), layer)


@pytest.mark.parametrize("name", NAMES)
def test_act_and_mul(name: str) -> None:
    gate_up = torch.randn(3, 2, 26) * 3
    exact = ACTIVATIONS[name](gate_up.double())
    out = launch(act_and_mul, gate_up, program_text(name))
    assert (out.double() - exact).norm() <= 2e-7 * exact.norm() * 3
    strided = torch.randn(26, 6).t()
    exact = ACTIVATIONS[name](strided.double())
    assert (launch(act_and_mul, strided, program_text(name)).double() - exact).norm() <= 6e-7 * exact.norm()


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_every_row_tile(block_m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristic_tiles, "_ROW_TILES", {block_m: 2**31})
    heuristic_tiles.tile_candidates.cache_clear()
    layer = make_layer(M=50, K=70, I=33, E=3, dtype=torch.bfloat16)
    try:
        assert_as_accurate(run_layer(layer), layer)
    finally:
        heuristic_tiles.tile_candidates.cache_clear()


@pytest.mark.parametrize("path", ["few-slots", "many-slots"])
@pytest.mark.parametrize(
    "case",
    [
        {"M": 0},
        {"M": 1, "topk": 1},
        {"M": 9, "topk": 3, "E": 40, "mapped": True, "skipped": True},
        {"M": 170, "topk": 3, "E": 7},
        # As many experts as buckets.
        {"M": 150, "topk": 2, "E": 32, "skipped": True},
        {"M": 140, "topk": 3, "E": 64, "mapped": True, "skipped": True},
        {"M": 129, "topk": 2, "E": 70, "mapped": True, "skipped": True},
        {"M": 340, "topk": 3, "E": 70, "mapped": True, "skipped": True},
        {"M": 300, "routing": "one"},
        {"M": 65, "strided": True, "ids_dtype": torch.int32},
    ],
    ids=str,
)
def test_sort(path: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "many-slots":
        monkeypatch.setattr(sort_kernels, "SMALL_MAX_SLOTS", -1)
    layer = make_layer(K=4, I=4, **case)
    arguments = (layer.topk_ids, layer.w1.size(0), layer.expert_map)
    for result, expected in zip(launch(sort_tokens, *arguments), sort_tokens_torch(*arguments), strict=True):
        assert torch.equal(result, expected)


def test_sort_skips_ids_far_out_of_range() -> None:
    ids = torch.tensor([[2**40, -(2**40)], [1, 5], [2**31, 0]])
    slots, offsets = launch(sort_tokens, ids, 3, None)
    assert offsets.tolist() == [0, 1, 2, 2]
    assert slots.tolist() == [5, 2, 0, 1, 3, 4]


@pytest.mark.parametrize("offsets", [[0, 90, 3, -5], [7, 6, 5, 4], [-(2**31), 2**31 - 1, 2, 99]], ids=str)
def test_gemms_stay_in_bounds_whatever_the_sort_says(offsets: list[int]) -> None:
    """The bounds checks of the interpreter raise on any access outside the arguments."""
    layer = make_layer(M=4, E=3)
    slots = torch.tensor([0, -7, 99, 2**31 - 1, 3, 4, 5, 7], dtype=torch.int32)
    bounds = torch.tensor(offsets, dtype=torch.int32)
    rows = launch(gather_gemm, layer.hidden_states, layer.w1, slots, bounds, 2, None, program_text("silu"))
    launch(scatter_gemm, rows, layer.w2, slots, bounds, 4, 2)
