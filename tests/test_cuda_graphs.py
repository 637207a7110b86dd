"""CUDA graphs of the layer and of blocks around it: replays, streams, memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.runtime.benchmarking import InductorBenchmarker

import compile_moe
from tests.support.block import Block, FusedBlock, assert_block_as_accurate, make_block
from tests.support.oracle import Layer, assert_as_accurate, make_layer
from tests.support.profiled import profiled

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "no_grad")]

SHAPE: dict[str, Any] = {"K": 128, "I": 64, "E": 8, "topk": 2, "dtype": torch.bfloat16, "device": "cuda"}
BLOCK: dict[str, Any] = {**SHAPE, "K": 512, "I": 256, "E": 32, "topk": 8}
ROUTINGS = ("random", "one", "empty", "skipped")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


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
    counters.clear()
    for _ in range(3):
        given = x.clone()
        torch.compiler.cudagraph_mark_step_begin()
        compiled(given, *rest)
        assert_as_accurate(given, layer)
    assert counters["inductor"]["cudagraph_skips"] >= 1


@pytest.mark.parametrize("mode", ["captured", "reduce-overhead"])
def test_a_replay_sees_new_weights_of_the_router_and_the_experts(mode: str) -> None:
    block = make_block(64, **BLOCK)
    module = FusedBlock(block)
    if mode == "captured":
        module(block.hidden_states)
        replay: Callable[..., Any] = capture(lambda: module(block.hidden_states))
    else:
        compiled = torch.compile(module, fullgraph=True, mode=mode)
        replay = lambda: [result.clone() for result in compiled(block.hidden_states)]
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            replay()
    counters.clear()
    chosen = []
    for _ in range(3):
        other = make_block(64, **BLOCK)
        for name in ("router", "w1", "w2"):
            getattr(module, name).copy_(getattr(other, name))
        torch.compiler.cudagraph_mark_step_begin()
        results = replay()
        # The module's parameters are the block's own tensors.
        assert_block_as_accurate(results, block)
        chosen.append(results[2].clone())
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert not torch.equal(chosen[0], chosen[1])


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


def reserved_by(prepare: Callable[[], Callable[[], Any]]) -> int:
    """Bytes that the allocator holds at the peak of what ``prepare`` does and returns, beyond those held before it."""
    torch.cuda.synchronize()
    # cuBLAS keeps a workspace for each stream.
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    run = prepare()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() - before


def reserved_eagerly_and_by_graphs(module: Any, tokens: list[Tensor], mode: str) -> tuple[int, int]:
    """Bytes for the largest of ``tokens`` eagerly, and for graphs of all of them."""

    def compiled_anew() -> Any:
        torch._dynamo.reset()  # the pool of graphs before would serve these, too
        return torch.compile(
            module,
            fullgraph=True,
            mode="reduce-overhead" if mode != "captured" else None,
            dynamic=len(tokens) > 1,
        )

    compiled = compiled_anew()
    stream = torch.cuda.Stream()
    pool = torch.cuda.MemPool()  # with nothing left in it by others, like a graph's
    for x in tokens:
        torch._dynamo.mark_static_address(x)  # a graph copies other inputs into its own pool

    def eager() -> None:
        with torch.cuda.use_mem_pool(pool), torch.cuda.stream(stream):
            module(tokens[0])

    def all_sizes() -> None:
        with torch.cuda.stream(stream):
            for x in tokens:
                torch.compiler.cudagraph_mark_step_begin()
                compiled(x)

    def graphs() -> Callable[[], Any]:
        return capture(lambda: compiled(tokens[0]), stream) if mode == "captured" else all_sizes

    # Kernels are compiled and loaded beforehand.
    with torch.cuda.stream(stream):
        module(tokens[0])
    all_sizes()
    if mode != "captured":
        compiled = compiled_anew()
    return reserved_by(lambda: eager), reserved_by(graphs)


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("captured", (4096,)),
        ("captured", (16384,)),
        ("reduce-overhead", (4096,)),
        ("reduce-overhead", (16384,)),
        ("reduce-overhead", (16384, 4096, 1024, 64, 16)),
    ],
)
def test_graphs_reserve_at_most_a_tenth_more_than_eager(
    mode: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights and tokens, and without what torch reserves in that mode for any module: a workspace of cuBLAS
    for one more stream, and what its pool rounds up to; and what inductor's timing of its kernels' variants overwrites
    the L2 cache with, out of the same pool. Graphs of several sizes together: no more than the largest.
    """
    monkeypatch.setattr(InductorBenchmarker, "L2_cache_size", 2**16)
    block = make_block(sizes[0], 2048, 768, 32, 8, dtype=torch.bfloat16, device="cuda")
    tokens = [block.hidden_states[:m].clone() for m in sizes]
    eager, graphs = reserved_eagerly_and_by_graphs(FusedBlock(block), tokens, mode)
    w = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    anything = reserved_eagerly_and_by_graphs(lambda x: x @ w, tokens[:1], mode)
    graphs -= min(max(0, anything[1] - anything[0]), 60 * 2**20)
    assert graphs <= 1.1 * eager, (graphs / 2**20, eager / 2**20, *anything)


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
