"""``compile-moe bench --host``: the launches of a call are found and repeated with its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.compiler import CompiledKernel

import compile_moe
from compile_moe.cli import host_time
from compile_moe.cli.bench_results import HostTime, Results, as_json, tables
from compile_moe.cli.contestants.contestant import Inputs
from compile_moe.cli.contestants.expert_weights import ExpertWeights
from compile_moe.cli.measurement import Bench
from compile_moe.cli.moe_layer import custom_configuration
from compile_moe.cli.moe_layer import make_layer as make_moe_layer
from compile_moe.cli.timing import Ceilings
from compile_moe.ops import gather_gemm, scatter_gemm, sort_tokens, weight_and_reduce
from compile_moe.ops.named_activations import program_text
from tests.support.launchers import launch
from tests.support.oracle import Layer, make_layer
from tests.support.simulated_gpu import simulated_gpu

KERNELS = ["sort_tiny_kernel", "gather_gemm_kernel", "scatter_gemm_kernel", "weight_and_reduce_kernel"]


@pytest.fixture
def layer() -> Layer:
    return make_layer(M=5, K=64, I=32, E=4, topk=2, dtype=torch.bfloat16)


def launch_layer(layer: Layer) -> None:
    x, w1, w2, weights, ids = layer.args
    slots, offsets = launch(sort_tokens, ids, w1.size(0), None)
    rows = launch(gather_gemm, x, w1, slots, offsets, ids.size(1), None, program_text("silu"))
    out = launch(scatter_gemm, rows, w2, slots, offsets, *ids.shape, None)
    launch(weight_and_reduce, out, weights, ids, None, w1.size(0))


def test_launches_are_repeated(layer: Layer) -> None:
    with simulated_gpu() as gpu:
        launch_layer(layer)
        before = CompiledKernel.__getitem__
        gpu.launched.clear()
        gpu.arguments.clear()
        launches = host_time.record(lambda: launch_layer(layer))
        assert CompiledKernel.__getitem__ is before
        # The call ran as ever, and is known by its kernels.
        assert gpu.launched == [bare.kernel.name for bare in launches] == KERNELS
        called = [tuple(map(identity, arguments)) for arguments in gpu.arguments]
        gpu.launched.clear()
        gpu.arguments.clear()
        host_time.launch_all(launches)
        assert gpu.launched == KERNELS
        assert [tuple(map(identity, arguments)) for arguments in gpu.arguments] == called
        del launches  # kernels unload from the driver that is active


def identity(argument: Any) -> Any:
    return id(argument) if isinstance(argument, torch.Tensor) else argument


def test_recording_ends_where_a_call_fails() -> None:
    def fails() -> None:
        raise ValueError("no")

    before = CompiledKernel.__getitem__
    with pytest.raises(ValueError, match="no"):
        host_time.record(fails)
    assert CompiledKernel.__getitem__ is before


def test_ratio(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def fused_experts(*args: Any, **options: Any) -> None:
        assert [id(a) for a in args] == [id(a) for a in layer.args]
        calls.append(options)
        launch_layer(layer)

    seconds = iter([60e-6, 40e-6])

    def host_seconds(call: Any, device: torch.device) -> float:
        call()
        return next(seconds)

    monkeypatch.setattr(compile_moe, "fused_experts", fused_experts)
    monkeypatch.setattr(host_time, "host_seconds", host_seconds)
    x, w1, w2, weights, ids = layer.args
    with simulated_gpu() as gpu:
        found = host_time.measure_host_time(
            ExpertWeights(w1, w2, None, None, "silu", torch.nn.functional.silu), Inputs(x, ids, weights)
        )
        # Compiled, recorded, timed; then launched bare.
        assert gpu.launched == KERNELS * 4
    assert [options["activation"] for options in calls] == ["silu"] * 3
    assert (found.num_experts, found.tokens, list(found.kernels)) == (4, 5, KERNELS)
    assert (found.call, found.launches, found.ratio) == pytest.approx((60, 40, 1.5))


def test_in_json_and_table() -> None:
    times = HostTime(4, 5, 60.0, 40.0, ("a", "b"))
    failed = HostTime(4, 65536, failure="out of memory")
    results = Results("H100", {}, "a model", "block", "bfloat16", Ceilings(1, 1), (), (times, failed))
    assert as_json(results)["host"] == [
        {**times._asdict(), "ratio": 1.5},
        {**failed._asdict(), "ratio": None},
    ]
    _, table = tables(results)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [("4", "5", "60.0", "40.0", "2", "1.50"), ("4", "65536", "out of memory", "", "", "")]


def test_a_call_that_fails() -> None:
    """It has a row that says why; the others are measured."""
    pytest.importorskip("transformers")
    with torch.no_grad():
        layer = make_moe_layer(
            custom_configuration(64, 32, 4, 2), "eager", torch.device("cpu"), torch.float32
        )
        (found,) = Bench(layer, True, Ceilings(1, 1)).host_times([3])
    assert (found.num_experts, found.tokens, found.ratio) == (4, 3, None)
    assert "CUDA" in found.failure or "NVIDIA" in found.failure


@pytest.mark.gpu
def test_on_a_gpu(layer: Layer) -> None:
    x, w1, w2, weights, ids = (t.cuda() for t in layer.args)
    experts = ExpertWeights(w1, w2, None, None, "silu", torch.nn.functional.silu)
    found = host_time.measure_host_time(experts, Inputs(x, ids, weights))
    assert list(found.kernels) == KERNELS and found.call > 0 and found.launches > 0
