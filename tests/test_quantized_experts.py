"""Quantized layers against float64: every scheme, hostile layers, every activation, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import compile_moe
from compile_moe import FusedMoEModularKernel, MoEPrepareAndFinalizeNoEP, TorchExperts, TritonExperts
from tests.support.oracle import ACTIVATIONS, CASES
from tests.support.quantized import VARIANTS, Quantized, Variant, assert_as_accurate, make_quantized

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EXPERTS: dict[str, type[Any]] = {"TritonExperts": TritonExperts, "TorchExperts": TorchExperts}
FP8 = Variant("fp8_w8a8_tensor")
STATIC = ("one", "each")


def kernel_of(q: Quantized, experts: str, **changes: Any) -> Callable[..., Tensor]:
    config = q.config(**changes)
    made = EXPERTS[experts](q.layer.w1_bias, q.layer.w2_bias, config)
    return FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(config), made)


def run(q: Quantized, experts: str = "fused_experts", backend: str | None = None) -> Tensor:
    options = q.layer.options
    function: Callable[..., Tensor]
    if experts == "fused_experts":
        function, options = compile_moe.fused_experts, options | {"quant_config": q.config()}
    else:
        function = kernel_of(q, experts)
        options = {k: v for k, v in options.items() if not k.endswith("_bias")}
    if backend is not None:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend=backend)
    return function(*q.args, **options)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_layer(case: str, variant: str, experts: str) -> None:
    q = make_quantized(VARIANTS[variant], **CASES[case])
    assert_as_accurate(run(q, experts), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(variant: str, dtype: torch.dtype) -> None:
    q = make_quantized(VARIANTS[variant], dtype=dtype, M=33, biased=True, skipped=True)
    assert_as_accurate(run(q), q)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64(variant: str) -> None:
    q = make_quantized(VARIANTS[variant], dtype=torch.float64, biased=True)
    torch.testing.assert_close(run(q), q.plain(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_activation(variant: str, activation: str) -> None:
    q = make_quantized(VARIANTS[variant], M=17, activation=activation, biased=True)
    assert_as_accurate(run(q), q)


CALLABLES: dict[str, Any] = {
    "pointwise": lambda x: F.silu(x[..., ::2].clamp(max=1.5)) * (x[..., 1::2] + 1),
    "row-wise": lambda x: F.softmax(x.chunk(2, -1)[0], -1) * x.chunk(2, -1)[1],
    # What is no zero for zeros must not reach a scale over all rows from skipped slots.
    "offset": lambda x: (
        F.softmax(x.chunk(2, -1)[0], -1) * 0 + x.chunk(2, -1)[1] + 3.0 * (x.sum(-1, keepdim=True) == 0)
    ),
}


@pytest.mark.parametrize("experts", ["fused_experts", *EXPERTS])
@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_callable(variant: str, name: str, experts: str) -> None:
    function = CALLABLES[name]
    q = make_quantized(VARIANTS[variant], M=17, activation=function, function=function, skipped=True, topk=3)
    assert_as_accurate(run(q, experts), q)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", ["M0", "M1", "skipped-mapped", "biased", "topk1-on-input"])
@pytest.mark.parametrize("static", STATIC)
def test_static_scales(static: str, case: str, experts: str) -> None:
    q = make_quantized(FP8, static=static, **CASES[case])
    assert_as_accurate(run(q, experts), q)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_overridden_activation(variant: str, experts: str) -> None:
    """Runs between the GEMMs, and what it makes of skipped slots reaches no scale."""
    q = make_quantized(VARIANTS[variant], M=17, topk=3, skipped=True)

    class Own(EXPERTS[experts]):  # type: ignore[misc]
        def activation(self, activation: Any, output: Tensor, input: Tensor) -> None:
            gate, up = input.chunk(2, -1)
            output.copy_(torch.where(input.abs().sum(-1, keepdim=True) == 0, 99.0, F.silu(gate) * up))

    kernel = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(q.config()), Own(quant_config=q.config()))
    assert_as_accurate(kernel(*q.args), q)


@pytest.mark.parametrize("experts", ["fused_experts", *EXPERTS])
@pytest.mark.parametrize("case", ["M0", "odd", "skipped-mapped", "topk1-on-input"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled(variant: str, case: str, experts: str) -> None:
    q = make_quantized(VARIANTS[variant], **CASES[case])
    assert_as_accurate(run(q, experts, "aot_eager"), q)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_through_inductor(variant: str, experts: str) -> None:
    q = make_quantized(VARIANTS[variant], E=3, skipped=True, mapped=True, biased=True, dtype=torch.bfloat16)
    assert_as_accurate(run(q, experts, "inductor"), q)


@pytest.mark.parametrize("static", STATIC)
def test_static_scales_through_inductor(static: str) -> None:
    q = make_quantized(FP8, static=static, skipped=True, dtype=torch.bfloat16)
    assert_as_accurate(run(q, "TritonExperts", "inductor"), q)


@pytest.mark.parametrize("variant", VARIANTS)
def test_callable_through_inductor(variant: str) -> None:
    function = CALLABLES["row-wise"]
    q = make_quantized(VARIANTS[variant], activation=function, function=function, skipped=True)
    assert_as_accurate(run(q, "fused_experts", "inductor"), q)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_compile_for_all_token_counts(variant: str) -> None:
    first = make_quantized(VARIANTS[variant], M=7)
    config, options = first.config(), {"fullgraph": True}
    counter = CompileCounterWithBackend("inductor")

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


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("static", ["", *STATIC])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_of_the_call_mean_the_same(variant: str, static: str, experts: str) -> None:
    if static and VARIANTS[variant].scheme != FP8.scheme:
        pytest.skip("only fp8_w8a8_tensor has static scales")
    q = make_quantized(VARIANTS[variant], static=static, skipped=True)
    in_config = kernel_of(q, experts)(*q.args)
    without = kernel_of(q, experts, **dict.fromkeys(q.scales))
    assert torch.equal(without(*q.args, **q.scales), in_config)
    assert torch.equal(kernel_of(q, experts)(*q.args, **q.scales), in_config)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_place(variant: str, backend: str | None) -> None:
    q = make_quantized(VARIANTS[variant])
    given = q.layer.hidden_states.clone()
    function = compile_moe.fused_experts
    if backend is not None:
        function = torch.compile(function, fullgraph=True, backend=backend)
    result = function(given, *q.args[1:], quant_config=q.config(), inplace=True)
    assert result.data_ptr() == given.data_ptr()
    assert_as_accurate(given, q)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str, experts: str) -> None:
    """Tokens, biases and results in the autocast dtype, as unquantized layers have them; scales stay."""
    q = make_quantized(VARIANTS[variant], biased=True, M=17)
    kernel = kernel_of(q, experts)
    with torch.autocast("cpu", torch.bfloat16):
        eager = kernel(*q.args)
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")(*q.args)
    low = q.layer.to(torch.bfloat16)
    low.w1, low.w2 = q.layer.w1, q.layer.w2
    q.layer = low
    assert_as_accurate(eager, q)
    assert_as_accurate(compiled, q)


@pytest.mark.parametrize("variant", VARIANTS)
def test_expert_parallel_shards_add_up(variant: str) -> None:
    q = make_quantized(VARIANTS[variant], M=33, E=6, topk=3)
    x, w1, w2, weights, ids = q.args
    total = torch.zeros_like(x)
    for rank in range(2):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[rank::2] = torch.arange(3, dtype=torch.int32)
        shard = {k: v if v is None else v[rank::2] for k, v in q.scales.items()}
        config = q.config(**shard)
        total += compile_moe.fused_experts(
            x, w1[rank::2], w2[rank::2], weights, ids, expert_map=expert_map, quant_config=config
        )
    assert_as_accurate(total, q)


class ZeroedFinalize(MoEPrepareAndFinalizeNoEP):
    """A finalize of the user's own, which gets every slot, skipped ones as zeros."""

    def finalize(
        self, output: Tensor, fused_out: Tensor, topk_weights: Tensor, topk_ids: Tensor, on_input: bool
    ) -> None:
        assert fused_out.dtype is output.dtype
        assert (fused_out[(topk_ids < 0) | (topk_ids == 5)] == 0).all()
        output.copy_((fused_out * topk_weights.unsqueeze(-1)).sum(1))


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_finalize_of_the_users_own(variant: str, experts: str) -> None:
    q = make_quantized(VARIANTS[variant], M=17, topk=3, skipped=True)
    kernel = FusedMoEModularKernel(ZeroedFinalize(q.config()), EXPERTS[experts](quant_config=q.config()))
    assert_as_accurate(kernel(*q.args), q)


def test_prepare_quantizes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens before they are multiplied by topk, then the rows between the GEMMs."""
    q = make_quantized(Variant("int8_w8a8_channel"), M=9, topk=3)
    from compile_moe.ops import quantize_tokens
    from compile_moe.prepare_finalize import no_expert_parallel

    seen: list[tuple[int, ...]] = []

    def spy(tokens: Tensor, *args: Any) -> Any:
        seen.append(tuple(tokens.shape))
        return quantize_tokens(tokens, *args)

    monkeypatch.setattr(no_expert_parallel, "quantize_tokens", spy)
    monkeypatch.setattr("compile_moe.experts.quantized.quantize_tokens", spy)
    run(q)
    assert seen == [(9, 48), (27, 40)]
