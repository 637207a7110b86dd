"""CUDA graphs of the layer and of blocks around it: replays, streams, memory, and the kernels that run on the GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import compile_moe
from tests.support.block import Block, FusedBlock, assert_block_as_accurate, make_block
from tests.support.oracle import Layer, assert_as_accurate, make_layer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "no_grad")]

SHAPE: dict[str, Any] = {"K": 128, "I": 64, "E": 8, "topk": 2, "dtype": torch.bfloat16, "device": "cuda"}
BLOCK: dict[str, Any] = {**SHAPE, "K": 512, "I": 256, "E": 32, "topk": 8}
ROUTINGS = ("random", "one", "empty", "skipped")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def profiled(call: Callable[[], Any]) -> Any:
    """Events of the host and of the GPU."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return profiler.events()


def on_gpu(call: Callable[[], Any]) -> list[str]:
    """What runs on the GPU, in order: kernels, copies and fills."""
    events = [event for event in profiled(call) if event.device_type.name == "CUDA"]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    # Ranges that torch marks are there, too.
    return [name for name in names if not name.startswith(("Torch-Compiled Region", "##", "ProfilerStep"))]


def other_tokens(block: Block, m: int) -> Block:
    """The same weights with m other tokens."""
    x = torch.randn(m, block.hidden_states.size(1), device="cuda").to(block.hidden_states.dtype)
    return Block(x, block.norms, block.router, block.w1, block.w2, block.topk)


def test_reduce_overhead_replays_a_block_at_several_sizes() -> None:
    block = make_block(**BLOCK)
    compiled = torch.compile(FusedBlock(block), fullgraph=True, mode="reduce-overhead")
    counters.clear()
    for m in (16, 64, 300, 1):
        for step in range(4):
            tokens = other_tokens(block, m)
            if m == 16 and step == 0:
                torch._dynamo.mark_dynamic(tokens.hidden_states, 0)
            torch.compiler.cudagraph_mark_step_begin()
            y, normalised, ids = compiled(tokens.hidden_states)
            assert_block_as_accurate((y.clone(), normalised.clone(), ids.clone()), tokens)
        torch.compiler.cudagraph_mark_step_begin()
        names = {event.name for event in profiled(lambda x=tokens.hidden_states: compiled(x))}
        assert any("cudaGraphLaunch" in name for name in names), (m, sorted(names))
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_in_place_on_a_graph_input_is_right_without_a_graph() -> None:
    layer = make_layer(M=16, **SHAPE)
    x, *rest = layer.args
    compiled = torch.compile(
        lambda *args: compile_moe.fused_experts(*args, inplace=True), fullgraph=True, mode="reduce-overhead"
    )
    for _ in range(3):
        given = x.clone()
        torch.compiler.cudagraph_mark_step_begin()
        compiled(given, *rest)
        assert_as_accurate(given, layer)


def routed(layer: Layer, m: int, routing: str) -> Layer:
    """A layer with other tokens, routing and map on the weights of ``layer``."""
    options: dict[str, Any] = {"skipped": True} if routing == "skipped" else {"routing": routing}
    other = make_layer(M=m, **SHAPE, mapped=True, **options)
    assert other.expert_map is not None
    if routing == "one":
        # An expert that is here; the map may have sent expert 1 elsewhere.
        other.topk_ids.copy_(other.expert_map.argmax().expand_as(other.topk_ids))
    other.w1, other.w2 = layer.w1, layer.w2
    return other


def copy_inputs(target: Layer, source: Layer) -> None:
    for name in ("hidden_states", "topk_weights", "topk_ids", "expert_map"):
        getattr(target, name).copy_(getattr(source, name))


@pytest.mark.parametrize("m", [1, 16, 3000])
def test_a_capture_replays_with_another_routing_and_map(m: int) -> None:
    layer = make_layer(M=m, **SHAPE, mapped=True)
    compile_moe.warm_up(layer.w1, layer.w2, SHAPE["topk"], expert_map=layer.expert_map)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compile_moe.fused_experts(*layer.args, expert_map=layer.expert_map)
    for routing in ROUTINGS * 2:
        other = routed(layer, m, routing)
        copy_inputs(layer, other)
        out.fill_(torch.nan)
        graph.replay()
        assert_as_accurate(out, other)


def test_a_capture_on_a_given_stream_while_another_works() -> None:
    layer, second = make_layer(M=64, **SHAPE), make_layer(M=64, **SHAPE)
    compile_moe.fused_experts(*layer.args)
    stream, busy = torch.cuda.Stream(), torch.cuda.Stream()
    noise = torch.ones(1 << 20, device="cuda")
    noise.mul_(1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        with torch.cuda.stream(busy):
            for _ in range(50):
                noise.mul_(1.0)
        out = compile_moe.fused_experts(*layer.args)
    torch.cuda.synchronize()
    for _ in range(3):
        out.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(busy):
            eager = compile_moe.fused_experts(*second.args)
        graph.replay()
        torch.cuda.synchronize()
        assert_as_accurate(out, layer)
        assert_as_accurate(eager, second)
    assert (noise == 1).all()


def capture(call: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> Callable[[], Any]:
    """What ``call`` does, as a graph; returns its output."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def peak_reserved(call: Callable[[], Any], before: int, captured: bool) -> int:
    """Bytes reserved beyond ``before`` at the peak of three calls, a capture included."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.synchronize()
    # cuBLAS keeps a workspace for each stream.
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = capture(call, stream) if captured else call
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() - before


@pytest.mark.parametrize("m", [16, 1024])
def test_a_capture_reserves_at_most_a_tenth_more_than_eager(m: int) -> None:
    """The weights are large against the allocator's segments of 2 and 20 MiB, which a graph's pool has of its own."""
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    block = make_block(m, 1024, 768, 96, 8, dtype=torch.bfloat16, device="cuda")
    module = FusedBlock(block)
    compiled = torch.compile(module, fullgraph=True)
    eager = peak_reserved(lambda: module(block.hidden_states), before, captured=False)
    captured = peak_reserved(lambda: compiled(block.hidden_states), before, captured=True)
    assert captured <= 1.1 * eager, (captured / 2**20, eager / 2**20)


@pytest.mark.parametrize("mode", ["eager", "compiled", "captured"])
def test_two_layers_on_two_streams_share_nothing(mode: str) -> None:
    """Interleaved without waiting for each other, they give the bits that each gives alone."""
    layers = [make_layer(M=300, **SHAPE) for _ in range(2)]
    function: Any = compile_moe.fused_experts
    if mode == "compiled":
        function = torch.compile(function, fullgraph=True)
    calls = [lambda layer=layer: function(*layer.args) for layer in layers]
    alone = [call().clone() for call in calls]
    if mode == "captured":
        calls = [capture(call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for call, stream, kept in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                # Replays write to the same place.
                kept.append(call().clone())
    torch.cuda.synchronize()
    for layer, expected, kept in zip(layers, alone, results, strict=True):
        assert_as_accurate(expected, layer)
        assert all(torch.equal(result, expected) for result in kept)


class WithSharedExpert(FusedBlock):
    """The block, and an expert that sees every token."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        alike: dict[str, Any] = {"bias": False, "device": self.w1.device, "dtype": self.w1.dtype}
        self.shared_w1, self.shared_w2 = (
            torch.nn.Linear(w.size(2), w.size(1), **alike) for w in (self.w1, self.w2)
        )

    def experts(self, h: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate, up = self.shared_w1(h).chunk(2, -1)
        return super().experts(h, weights, ids) + self.shared_w2(F.silu(gate) * up)


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared-expert"])
def test_kernels_of_a_decode_block(m: int, shared: bool) -> None:
    """RMSNorm and router GEMM; at most five more; and a shared expert's two GEMMs with an activation between."""
    block = make_block(m, 1024, 768, 128, 8, dtype=torch.bfloat16, device="cuda")
    module = WithSharedExpert(block) if shared else FusedBlock(block)
    compiled = torch.compile(module, fullgraph=True)
    for _ in range(2):
        compiled(block.hidden_states)
    # What a GEMM of cuBLAS does before and after itself is its own.
    beside_gemms = ("Memcpy", "Memset", "splitKreduce")
    kernels = [
        name
        for name in on_gpu(lambda: compiled(block.hidden_states))
        if not any(part in name for part in beside_gemms)
    ]
    assert len(kernels) <= 2 + 5 + 3 * shared, kernels
    assert sum(name.startswith("triton_") for name in kernels) == 2 + shared, kernels
    for kernel in ("gather_gemm", "scatter_gemm", "weight_and_reduce"):
        assert sum(kernel in name for name in kernels) == 1, (kernel, kernels)


def test_the_layer_copies_and_fills_nothing() -> None:
    layer = make_layer(M=16, **SHAPE)
    compiled = torch.compile(compile_moe.fused_experts, fullgraph=True)
    for _ in range(2):
        compiled(*layer.args)
    names = on_gpu(lambda: compiled(*layer.args))
    expected = ("sort", "gather_gemm", "scatter_gemm", "weight_and_reduce")
    assert len(names) == 4 and all(e in name for e, name in zip(expected, names, strict=True)), names
