"""What only a GPU can show: graph capture and replay, no synchronization, device guard, large sizes, TF32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import compile_moe
from compile_moe.ops import sort_tokens
from compile_moe.ops.sort_tokens import sort_tokens_torch
from tests.support.block import FusedBlock, assert_block_as_accurate, make_block
from tests.support.oracle import Layer, assert_as_accurate, make_layer
from tests.support.precision import tf32

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo")]

SHAPE: dict[str, Any] = {"K": 128, "I": 64, "E": 8, "topk": 2, "dtype": torch.bfloat16, "device": "cuda"}
ROUTINGS: tuple[dict[str, Any], ...] = ({}, {"routing": "one"}, {"routing": "empty"}, {"skipped": True})


def same_weights(layer: Layer, m: int, **routing: Any) -> Layer:
    """A layer with other tokens and routing on the weights of ``layer``."""
    other = make_layer(M=m, **SHAPE, **routing)
    other.w1, other.w2 = layer.w1, layer.w2
    return other


@contextmanager
def synchronization_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("m", [1, 7, 64, 3000])
def test_capture_replays_with_other_inputs(m: int) -> None:
    layer = make_layer(M=m, **SHAPE)
    x, w1, w2, weights, ids = layer.args
    compile_moe.warm_up(w1, w2, SHAPE["topk"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compile_moe.fused_experts(x, w1, w2, weights, ids)
    for routing in ROUTINGS * 2:
        other = same_weights(layer, m, **routing)
        x.copy_(other.hidden_states)
        weights.copy_(other.topk_weights)
        ids.copy_(other.topk_ids)
        out.fill_(torch.nan)
        graph.replay()
        assert_as_accurate(out, other)


def test_first_call_inside_a_capture_names_the_way_out() -> None:
    shape = {**SHAPE, "K": 160, "I": 96}
    layer = make_layer(M=4, **shape)
    with pytest.raises(RuntimeError, match=r"compile_moe\.warm_up"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        compile_moe.fused_experts(*layer.args)
    torch.cuda.synchronize()
    assert_as_accurate(compile_moe.fused_experts(*layer.args), layer)


@pytest.mark.parametrize("m", [1, 16, 64, 2000])
def test_reduce_overhead_replays_a_cuda_graph(m: int) -> None:
    layer = make_layer(M=m, **SHAPE)
    compiled = torch.compile(compile_moe.fused_experts, fullgraph=True, mode="reduce-overhead")
    counters.clear()
    for routing in ROUTINGS * 2:
        torch.compiler.cudagraph_mark_step_begin()
        other = same_weights(layer, m, **routing)
        assert_as_accurate(compiled(*other.args).clone(), other)
    assert counters["inductor"]["cudagraph_skips"] == 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(*layer.args)
    assert any("cudaGraphLaunch" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("m", [1, 64, 5000])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_synchronizes(m: int, compiled: bool) -> None:
    layer = make_layer(M=m, **SHAPE, mapped=True, biased=True)
    function: Any = lambda *args: compile_moe.fused_experts(*args, **layer.options)
    if compiled:
        function = torch.compile(function, fullgraph=True)
    function(*layer.args)
    with synchronization_is_an_error():
        out = function(*layer.args)
    assert_as_accurate(out, layer)


ROUTERS: dict[str, Any] = {
    "softmax_topk": lambda x: compile_moe.routers.softmax_topk(x, 2, renormalize=True),
    "topk_softmax": lambda x: compile_moe.routers.topk_softmax(x, 2),
    "sigmoid_grouped_topk": lambda x: compile_moe.routers.sigmoid_grouped_topk(
        x, 2, correction_bias=x[0].float(), num_expert_group=4, topk_group=2
    ),
}


@pytest.mark.parametrize("m", [1, 64, 5000])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("router", ROUTERS)
def test_routers_do_not_synchronize(router: str, compiled: bool, m: int) -> None:
    route = ROUTERS[router]
    function = torch.compile(route, fullgraph=True) if compiled else route
    logits = torch.randn(m, 32, device="cuda")
    function(logits)
    with synchronization_is_an_error():
        weights, ids = function(logits)
    expected_weights, expected_ids = route(logits.cpu())
    order, expected_order = ids.argsort(-1), expected_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order).cpu(), expected_ids.gather(1, expected_order))
    torch.testing.assert_close(
        weights.gather(1, order).cpu(), expected_weights.gather(1, expected_order), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("m", [1, 64, 5000])
def test_a_compiled_block_does_not_synchronize(m: int) -> None:
    block = make_block(m, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(FusedBlock(block), fullgraph=True)
    with torch.no_grad():
        compiled(block.hidden_states)
        with synchronization_is_an_error():
            results = compiled(block.hidden_states)
    assert_block_as_accurate(results, block)


class ScatterAdd(compile_moe.MoEPrepareAndFinalizeNoEP):
    """A user's own finalize."""

    def finalize(self, output: Tensor, fused_expert_output: Tensor, *args: Any) -> None:
        weights, on_input = args[0], args[2]
        terms = fused_expert_output.float()
        terms = terms if on_input else terms * weights.unsqueeze(-1)
        output.copy_(terms.sum(1))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_users_finalize_does_not_make_us_synchronize(compiled: bool) -> None:
    layer = make_layer(M=64, **SHAPE, skipped=True)
    function: Any = compile_moe.FusedMoEModularKernel(ScatterAdd(), compile_moe.TritonExperts())
    if compiled:
        function = torch.compile(function, fullgraph=True)
    function(*layer.args)
    with synchronization_is_an_error():
        out = function(*layer.args)
    assert_as_accurate(out, layer, 4.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_current_device() -> None:
    layer = make_layer(M=9, **{**SHAPE, "device": "cuda:1"})
    with torch.cuda.device(0):
        assert_as_accurate(compile_moe.fused_experts(*layer.args), layer)


def test_launches_run_on_the_current_stream() -> None:
    layer = make_layer(M=64, **SHAPE)
    compile_moe.fused_experts(*layer.args)
    stream = torch.cuda.Stream()
    x = layer.hidden_states.clone()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.mul_(2)
        out = compile_moe.fused_experts(x, *layer.args[1:])
    torch.cuda.current_stream().wait_stream(stream)
    layer.hidden_states = x
    assert_as_accurate(out, layer)


@pytest.mark.parametrize("slots", [1, 32, 33, 600, 1024, 1025, 10_000, 524_288])
@pytest.mark.parametrize("experts", [1, 8, 128, 500, 3000])
def test_sort_equals_torch(slots: int, experts: int) -> None:
    topk = 8 if slots % 8 == 0 else 1
    ids = torch.randint(-1, experts + 1, (slots // topk, topk), device="cuda")
    for result, expected in zip(sort_tokens(ids, experts), sort_tokens_torch(ids, experts), strict=True):
        assert torch.equal(result, expected)


def test_many_tokens() -> None:
    layer = make_layer(M=65536, **SHAPE)
    assert_as_accurate(compile_moe.fused_experts(*layer.args), layer)


@pytest.mark.parametrize("allowed", [False, True], ids=["ieee", "tf32"])
def test_float32_follows_torchs_precision(allowed: bool) -> None:
    layer = make_layer(M=100, **{**SHAPE, "dtype": torch.float32, "K": 512})
    with tf32(allowed):
        out = compile_moe.fused_experts(*layer.args)
        assert_as_accurate(out, layer)
    exact = layer.to(torch.float64).reference()
    error = ((out.double() - exact).norm() / exact.norm()).item()
    assert error > 1e-5 if allowed else error < 2e-6


def test_an_id_out_of_range_is_skipped_or_raises_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(M=9, **SHAPE)
    layer.topk_ids[3, 1] = 1000
    expected = make_layer(M=9, **SHAPE)
    expected.__dict__.update({**layer.__dict__, "topk_ids": layer.topk_ids.clamp(max=SHAPE["E"])})
    assert_as_accurate(compile_moe.fused_experts(*layer.args), expected)
    monkeypatch.setitem(os.environ, "COMPILE_MOE_DEBUG", "1")
    with pytest.raises(ValueError, match="got 1000"):
        compile_moe.fused_experts(*layer.args)


def test_eager_leaves_no_memory_behind() -> None:
    layer = make_layer(M=64, **SHAPE)
    compile_moe.fused_experts(*layer.args)
    before = torch.cuda.memory_allocated()
    out: Tensor | None = None
    for _ in range(5):
        out = compile_moe.fused_experts(*layer.args)
    assert out is not None
    size = out.numel() * out.element_size()
    del out
    assert torch.cuda.memory_allocated() <= before + size
