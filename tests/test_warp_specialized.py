"""The warp-specialized GEMMs: when they are chosen, what they launch, and on Hopper, what they compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import compile_moe
from compile_moe.ops import gather_gemm, scatter_gemm
from compile_moe.ops.kernels import remembered_calls, tuned_tiles
from compile_moe.ops.kernels.gemm_problem import GemmProblem, has_boxes
from compile_moe.ops.kernels.launch import loading_everything
from compile_moe.ops.kernels.tile_space import tile_space, why_not
from compile_moe.ops.kernels.tiles import (
    SIXTEEN_BIT_TILES,
    WARP_SPECIALIZED,
    WARP_SPECIALIZED_64,
    WARP_SPECIALIZED_FROM,
    WIDE_64,
    WIDE_128,
    DeviceLimits,
    Tile,
)
from compile_moe.ops.kernels.warp_specialized import row_tiles
from compile_moe.ops.named_activations import program_text
from tests.support.launchers import launch
from tests.support.oracle import Layer, assert_as_accurate, make_layer
from tests.support.simulated_gpu import simulated_gpu
from tests.support.warp_specialized import (
    LAYERS,
    assert_both_were_launched,
    few_programs,
    on_hopper,
    warp_specialized_wherever_possible,
)

HOPPER = DeviceLimits(227 * 1024, async_mma=True, warp_specialized=True)
AMPERE = DeviceLimits(163 * 1024, async_mma=False)
PROBLEM = GemmProblem("gather_gemm", 8, 512, 256, "bfloat16", "16-bit", "concatenated", False, True, True)


@pytest.fixture
def always() -> Iterator[None]:
    """Chosen for all GEMMs of enough rows that can run so."""
    with warp_specialized_wherever_possible():
        yield


@pytest.fixture(params=SIXTEEN_BIT_TILES, ids=lambda tile: f"{tile.block_m}x{tile.block_n}")
def always_each(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of their tiles."""
    with warp_specialized_wherever_possible(request.param):
        yield


def test_who_can_run_it() -> None:
    for tile in SIXTEEN_BIT_TILES:
        assert why_not(tile, PROBLEM, HOPPER) == ""
        assert "on sm_90" in why_not(tile, PROBLEM, AMPERE)
        assert "on sm_90" in why_not(tile, PROBLEM._replace(has_boxes=False), HOPPER)
        assert "must be" in why_not(tile._replace(block_k=32), PROBLEM, HOPPER)
    enough = WARP_SPECIALIZED_FROM * 8
    assert tile_space(PROBLEM, enough, HOPPER)[:5] == SIXTEEN_BIT_TILES
    for space in (tile_space(PROBLEM, enough - 1, HOPPER), tile_space(PROBLEM, enough, AMPERE)):
        assert not any(tile.warp_specialized for tile in space)


def test_who_runs_it_untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The more rows an average expert has, the more have room in the ring."""
    monkeypatch.setattr(tuned_tiles, "device_limits", lambda index: HOPPER)
    problem = PROBLEM._replace(num_experts=66)
    taken, tiles = [], (None, WIDE_64, WIDE_128, WARP_SPECIALIZED)
    for slots in (1, 56 * 66 - 1, 56 * 66, 84 * 66 - 1, 84 * 66, 148 * 66 - 1, 148 * 66, 2**24):
        choice = tuned_tiles.heuristic_choice(problem, slots, 0)
        taken.append(choice.tile if choice.tile.warp_specialized else None)
        assert choice.candidates[-3:] == tiles[1:] and choice.tile in choice.candidates
        other = tuned_tiles.heuristic_choice(problem._replace(has_boxes=False), slots, 0)
        assert other.candidates == choice.candidates[:-3]
    assert taken == [tile for tile in tiles for _ in range(2)]
    # 66 experts times 2 wide tiles of their 512 rows of weights are as many as multiprocessors, or 33 times 4.
    for experts, expected in (
        (66, WIDE_64),
        (65, WARP_SPECIALIZED_64),
        (33, WARP_SPECIALIZED_64),
        (32, None),
    ):
        tile = tuned_tiles.heuristic_choice(PROBLEM._replace(num_experts=experts), 60 * experts, 0).tile
        assert (tile if tile.warp_specialized else None) == expected
    # 384 rows of weights are three narrow tiles, and a half more of wide ones.
    odd = PROBLEM._replace(num_experts=132, intermediate_size=192)
    assert tuned_tiles.heuristic_choice(odd, 60 * 132, 0).tile == WARP_SPECIALIZED_64
    few = PROBLEM._replace(num_experts=32)
    choice = tuned_tiles.heuristic_choice(few, 128 * 32, 0)
    assert (
        [tile for tile in choice.candidates if tile.warp_specialized] == [choice.tile] == [WARP_SPECIALIZED]
    )
    monkeypatch.setattr(tuned_tiles, "device_limits", lambda index: AMPERE)
    choice = tuned_tiles.heuristic_choice(PROBLEM, 2**24, 0)
    assert not any(tile.warp_specialized for tile in choice.candidates)


def test_what_the_memory_accelerator_reads() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    x, w, out = empty(64, 128), empty(4, 64, 128), empty(96, 32)
    assert has_boxes(x, w, out)
    assert not has_boxes(x.to(torch.float8_e4m3fn), w, out)
    assert not has_boxes(x.float(), w.float(), out.float())
    assert not has_boxes(x, empty(4, 128, 64).mT, out, "concatenated")
    assert all(has_boxes(x, empty(4, 128, 64).mT, out, layout) for layout in ("ungated", "interleaved"))
    assert not has_boxes(x, empty(4, 128, 60).mT, empty(96, 56), "ungated")
    eighths = x.to(torch.float8_e4m3fn)
    assert has_boxes(eighths, w.to(torch.float8_e4m3fn), out)
    assert not has_boxes(eighths, empty(4, 128, 64).to(torch.float8_e4m3fn).mT, out, "ungated")
    assert not has_boxes(empty(64, 132)[:, :128], w, out)
    assert not has_boxes(empty(64 * 128 + 1)[1:].view(64, 128), w, out)
    assert not has_boxes(x[:, :124], w[:, :, :124], out)
    assert not has_boxes(x, w, empty(96, 36))
    assert not has_boxes(x, empty(1, 64, 128).expand(4, 64, 128), out)
    assert has_boxes(empty(64, 256)[:, :128], empty(4, 64, 256)[:, :, :128], out)


def gemms(layer: Layer, *, zero_skipped: bool = False) -> None:
    x, w1, w2, _, ids = layer.args
    e, (m, topk) = w1.size(0), ids.shape
    slots, offsets = torch.arange(m * topk, dtype=torch.int32), torch.zeros(e + 1, dtype=torch.int32)
    rows = launch(gather_gemm, x, w1, slots, offsets, topk, layer.w1_bias, program_text("silu"), zero_skipped)
    launch(scatter_gemm, rows, w2, slots, offsets, m, topk, layer.w2_bias, zero_skipped)


def test_launches(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of row tiles, then the GEMM, over the tensors of each call; other numbers of tokens load nothing."""
    for module in (row_tiles, tuned_tiles):
        monkeypatch.setattr(module, "device_limits", lambda index: HOPPER)
    layer, other = (make_layer(M=256, K=64, I=32, E=4, dtype=torch.bfloat16) for _ in range(2))
    other.w1, other.w2 = layer.w1.clone(), layer.w2
    with simulated_gpu() as gpu:
        gemms(layer)
        both = ["row_tiles_kernel", "gather_gemm_kernel", "row_tiles_kernel", "scatter_gemm_kernel"]
        assert gpu.launched == both
        gpu.capturing = True
        gemms(layer)
        gemms(other)
        assert gpu.launched == both * 3
        first, second, third = (gpu.arguments[i] for i in (1, 5, 9))
        assert first[1] is second[1] is layer.hidden_states and third[1] is other.hidden_states
        assert first[2].base is second[2].base is layer.w1 and third[2].base is other.w1
        assert first[2].shape == third[2].shape == [4, 4, 2, 8, 64]
        assert first[5].data_ptr() != 0 and first[0] is not second[0]
        gpu.capturing = False
        gpu.launched.clear()
        gemms(layer, zero_skipped=True)
        assert gpu.launched == [*both[:2], "zero_skipped_kernel", *both[2:], "zero_skipped_kernel"]


@pytest.mark.parametrize("m", [0, 1])
def test_the_first_call_may_have_no_rows(always: None, monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    """The warm-up loads what later calls need."""
    for module in (row_tiles, tuned_tiles):
        monkeypatch.setattr(module, "device_limits", lambda index: HOPPER)
    first, layer = (make_layer(M=n, K=64, I=32, E=4, dtype=torch.bfloat16) for n in (m, 256))
    first.w1, first.w2 = layer.w1, layer.w2
    with simulated_gpu() as gpu:
        with loading_everything():
            gemms(first)
        gpu.capturing = True
        gemms(layer)
        assert gpu.launched[-4:] == [
            "row_tiles_kernel",
            "gather_gemm_kernel",
            "row_tiles_kernel",
            "scatter_gemm_kernel",
        ]


def test_they_load_at_the_first_call_of_many_rows_or_in_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (row_tiles, tuned_tiles):
        monkeypatch.setattr(module, "device_limits", lambda index: HOPPER)
    few, many, others = (
        make_layer(M=m, K=k, I=32, E=4, dtype=torch.bfloat16) for m, k in ((3, 64), (512, 64), (512, 128))
    )
    many.w1, many.w2 = few.w1, few.w2
    with simulated_gpu() as gpu:
        gemms(few)
        gpu.capturing = True
        gemms(few)
        with pytest.raises(
            RuntimeError, match=r"gather_gemm .*with at least as many tokens; compile_moe\.warm_up"
        ):
            gemms(many)
        gpu.capturing = False
        with loading_everything():
            gemms(few)
        gpu.capturing = True
        gpu.launched.clear()
        gemms(many)
        both = ["row_tiles_kernel", "gather_gemm_kernel", "row_tiles_kernel", "scatter_gemm_kernel"]
        assert gpu.launched == both
        gpu.capturing = False
        gemms(others)
        gpu.capturing = True
        gemms(others)
        assert gpu.launched == both * 3
        fewer = make_layer(M=5, K=128, I=32, E=4, dtype=torch.bfloat16)
        fewer.w1, fewer.w2 = others.w1, others.w2
        gemms(fewer)
        assert gpu.launched[-2:] == ["gather_gemm_kernel", "scatter_gemm_kernel"]


@pytest.mark.parametrize("tuned", [200, 400])
def test_they_load_with_more_rows_that_were_tuned_to_take_others(
    tuned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tuned tiles, or because nothing was tuned for so few rows."""
    for module in (row_tiles, tuned_tiles):
        monkeypatch.setattr(module, "device_limits", lambda index: HOPPER)
    other = Tile(64, 32, 64, 3, 4)
    monkeypatch.setattr(tuned_tiles, "_tuned_tiles", lambda *_: {2048: other, tuned: WARP_SPECIALIZED})
    many, fewer = (make_layer(M=m, K=64, I=32, E=4, dtype=torch.bfloat16) for m in (1024, 260))
    fewer.w1, fewer.w2 = many.w1, many.w2
    with simulated_gpu() as gpu:
        gemms(many)
        assert gpu.launched == ["gather_gemm_kernel", "scatter_gemm_kernel"]
        gpu.capturing = True
        gpu.launched.clear()
        gemms(fewer)
        assert gpu.launched == [
            f"{name}_kernel" for name in ("row_tiles", "gather_gemm", "row_tiles", "scatter_gemm")
        ]


def test_few_rows_take_other_tiles(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (row_tiles, tuned_tiles):
        monkeypatch.setattr(module, "device_limits", lambda index: HOPPER)
    with simulated_gpu() as gpu:
        gemms(make_layer(M=2 * WARP_SPECIALIZED_FROM - 1, K=64, I=32, E=4, dtype=torch.bfloat16))
        assert gpu.launched == ["gather_gemm_kernel", "scatter_gemm_kernel"]


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", LAYERS)
def test_layer(case: str, dtype: torch.dtype, always_each: None) -> None:
    layer = make_layer(**LAYERS[case], dtype=dtype, device="cuda")
    first = compile_moe.fused_experts(*layer.args, **layer.options)
    assert_as_accurate(first, layer)
    assert_both_were_launched()
    for _ in range(3):
        assert torch.equal(compile_moe.fused_experts(*layer.args, **layer.options), first)


@on_hopper
@pytest.mark.gpu
def test_every_number_of_rows(always_each: None) -> None:
    """Each size that a tile can have, its tail included."""
    counts = [
        0,
        1,
        31,
        32,
        33,
        64,
        65,
        96,
        97,
        128,
        129,
        160,
        161,
        192,
        256,
        257,
        288,
        289,
        320,
        512,
        577,
        863,
        865,
    ]
    layer = make_layer(
        M=sum(counts), K=192, I=136, E=len(counts), topk=1, dtype=torch.bfloat16, device="cuda"
    )
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    layer.topk_ids = ids[torch.randperm(len(ids))][:, None].cuda()
    assert_as_accurate(compile_moe.fused_experts(*layer.args), layer)
    assert_both_were_launched()


@on_hopper
@pytest.mark.gpu
def test_values_that_are_not_finite_stay_in_their_rows(always_each: None) -> None:
    layer = make_layer(M=700, K=256, I=128, E=4, dtype=torch.bfloat16, device="cuda")
    layer.hidden_states[5] = torch.nan
    layer.hidden_states[77] = torch.inf
    out = compile_moe.fused_experts(*layer.args)
    assert (~out.isfinite()).any(1).nonzero().flatten().tolist() == [5, 77]


@on_hopper
@pytest.mark.gpu
def test_replays_with_other_routing(always_each: None) -> None:
    """Also with every slot skipped: no row tile at all."""
    layer = make_layer(M=1024, K=256, I=128, E=8, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with few_programs():
        compile_moe.fused_experts(*layer.args)
        with torch.cuda.graph(graph):
            out = compile_moe.fused_experts(*layer.args)
    for ids in (torch.randint(0, 8, (1024, 2)), torch.full((1024, 2), 3), torch.full((1024, 2), -1)):
        layer.topk_ids.copy_(ids)
        out.fill_(torch.nan)
        graph.replay()
        assert_as_accurate(out, layer)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("case", ["plain", "transposed, ungated"])
def test_remembered_calls(case: str) -> None:
    """Each over other tokens, routing and weights, of which descriptors are part; earlier results stay."""
    remembered_calls.forget()
    layers = [
        make_layer(**{**LAYERS[case], "M": 1300}, dtype=torch.bfloat16, device="cuda") for _ in range(4)
    ]
    results = [compile_moe.fused_experts(*layer.args, **layer.options) for layer in layers]
    for layer, result in zip(layers, results, strict=True):
        assert_as_accurate(result, layer)
    calls = [call for calls in remembered_calls._remembered.values() for call in calls.values()]
    assert len(calls) == 1 and calls[0] is not None
    names = [launch.kernel.name for launch in calls[0].launches.launches]
    assert names.count("row_tiles_kernel") == 2 and len(calls[0].launches.described) >= 4
