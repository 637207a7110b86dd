"""Quantized layers inside torch.compile: as accurate as eager ones, one graph, few compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.testing import CompileCounterWithBackend

import compile_moe
from compile_moe import FusedMoEQuantConfig
from compile_moe.quantized_layer import quantized_fused_moe
from tests.support.oracle import CASES
from tests.support.quantized import (
    ONE_A_SCALING,
    VARIANTS,
    Quantized,
    Variant,
    assert_as_accurate,
    make_quantized,
)
from tests.support.quantized_calls import CALLABLES, STATIC, run
from tests.support.quantized_inputs import opcheck

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FP8 = Variant("fp8_w8a8_tensor")


# Every scheme, and every case with each way to scale tokens; test_through_inductor has TritonExperts of every scheme.
@pytest.mark.parametrize(
    ("variant", "case", "experts"),
    [
        *((v, "skipped-mapped", e) for v in VARIANTS for e in ("fused_experts", "TorchExperts")),
        *((v, c, "fused_experts") for v in ONE_A_SCALING for c in ("M0", "odd", "topk1-on-input")),
        *((v, c, "TorchExperts") for v in ONE_A_SCALING for c in ("M0", "topk1-on-input")),
    ],
)
def test_compiled(variant: str, case: str, experts: str) -> None:
    q = make_quantized(VARIANTS[variant], **CASES[case])
    assert_as_accurate(run(q, experts, "aot_eager"), q)


# TorchExperts' GEMMs are one op, whatever the scheme.
@pytest.mark.parametrize(
    ("variant", "experts"),
    [*((v, "TritonExperts") for v in VARIANTS), *((v, "TorchExperts") for v in ONE_A_SCALING)],
)
def test_through_inductor(variant: str, experts: str) -> None:
    q = make_quantized(VARIANTS[variant], E=3, skipped=True, mapped=True, biased=True, dtype=torch.bfloat16)
    assert_as_accurate(run(q, experts, "inductor"), q)


@pytest.mark.parametrize("static", STATIC)
def test_static_scales_through_inductor(static: str) -> None:
    q = make_quantized(FP8, static=static, skipped=True, dtype=torch.bfloat16)
    assert_as_accurate(run(q, "TritonExperts", "inductor"), q)


@pytest.mark.parametrize("variant", ONE_A_SCALING)
def test_callable_through_inductor(variant: str) -> None:
    function = CALLABLES["row-wise"]
    q = make_quantized(VARIANTS[variant], activation=function, function=function, skipped=True)
    assert_as_accurate(run(q, "fused_experts", "inductor"), q)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dynamo_sees_one_call(variant: str) -> None:
    """Which passes opcheck, and not what the modular kernel does around the stages."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph

    q = make_quantized(VARIANTS[variant], E=4, skipped=True, mapped=True, biased=True, activation="gelu")
    assert_as_accurate(run(q, backend=keep), q)
    (graph,) = graphs
    (call,) = graph.graph.find_nodes(op="call_function", target=quantized_fused_moe)
    assert [node.op for node in graph.graph.nodes if node.op not in ("placeholder", "output")] == [
        "call_function"
    ]
    config, layer = q.config(), q.layer
    scales = config.w1_scale, config.w2_scale, config.w1_zp, config.w2_zp, config.a1_scale, config.a2_scale
    options = "gelu", -1, layer.expert_map, False, layer.w1_bias, layer.w2_bias
    arguments = *q.args, config.facts.text, *scales, *options
    assert [a for a in call.args if isinstance(a, str)] == [a for a in arguments if isinstance(a, str)]
    opcheck(quantized_fused_moe, arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_compile_for_all_token_counts(variant: str) -> None:
    first = make_quantized(VARIANTS[variant], M=7)
    config, options = first.config(), {"fullgraph": True}
    # Inductor compiles what tokens are quantized by; the GEMMs are ops to it.
    counter = CompileCounterWithBackend("inductor" if variant in ONE_A_SCALING else "aot_eager")

    def layer(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return compile_moe.fused_experts(x, w1, w2, weights, ids, quant_config=config)

    compiled = torch.compile(layer, backend=counter, **options)
    for m in (7, 2, 3, 16, 333):
        more = make_quantized(VARIANTS[variant], M=m)
        more.q1, more.q2, more.layer.w1, more.layer.w2 = first.q1, first.q2, first.layer.w1, first.layer.w2
        args = more.args
        if m == 7:
            for i in (0, 3, 4):
                torch._dynamo.mark_dynamic(args[i], 0)
        assert_as_accurate(compiled(*args), more)
    assert counter.frame_count == 1


@pytest.mark.parametrize("variant", ["fp8_w8a8_block-block_shape(16,24)", "int4_w4a16-group_size16-zp"])
def test_one_compile_for_unbacked_token_counts(variant: str) -> None:
    first = make_quantized(VARIANTS[variant], M=7)
    config = first.config()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda *args: compile_moe.fused_experts(*args, quant_config=config), backend=counter, fullgraph=True
    )
    for m in (7, 1, 0, 16):
        more = make_quantized(VARIANTS[variant], M=m)
        more.q1, more.q2, more.layer.w1, more.layer.w2 = first.q1, first.q2, first.layer.w1, first.layer.w2
        args = more.args
        for i in (0, 3, 4):
            torch._dynamo.decorators.mark_unbacked(args[i], 0)
        assert_as_accurate(compiled(*args), more)
    assert counter.frame_count == 1


def sized(scheme: str, name: str, value: object) -> Quantized:
    return make_quantized(Variant(scheme, ((name, value),)), K=64, I=64)


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_vary_among_the_layers_of_a_graph(dynamic: bool | None) -> None:
    """They are no symbols, however dynamo sees integers that change."""

    def layer(*args: Tensor, config: FusedMoEQuantConfig) -> Tensor:
        return compile_moe.fused_experts(*args, quant_config=config)

    compiled: Callable[..., Tensor] = torch.compile(
        layer, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for q in (
        *(sized("int4_w4a16", "group_size", g) for g in (16, 32, 8)),
        *(sized("fp8_w8a8_block", "block_shape", b) for b in ((16, 16), (8, 32))),
    ):
        assert_as_accurate(compiled(*q.args, config=q.config()), q)


class Layer(torch.nn.Module):
    """A layer that makes its config where it is called."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.q = make_quantized(variant)
        self.w1, self.w2 = self.q.q1.weight, self.q.q2.weight
        self.scales = self.q.scales

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        config = FusedMoEQuantConfig(self.q.variant.scheme, **self.scales)
        return compile_moe.fused_experts(x, self.w1, self.w2, topk_weights, topk_ids, quant_config=config)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not VARIANTS[v].sizes])
def test_layers_compiled_one_by_one_share_one_compile(variant: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    for _ in range(12):
        layer = Layer(VARIANTS[variant])
        x, _, _, weights, ids = layer.q.args
        result = torch.compile(layer, fullgraph=True, backend=counter)(x, weights, ids)
        assert_as_accurate(result, layer.q)
    assert counter.frame_count == 1


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not VARIANTS[v].sizes])
def test_export(variant: str) -> None:
    layer = Layer(VARIANTS[variant])
    x, _, _, weights, ids = layer.q.args
    exported = torch.export.export(layer, (x, weights, ids))
    assert_as_accurate(exported.module()(x, weights, ids), layer.q)
