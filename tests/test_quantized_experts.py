"""Quantized layers against float64: every scheme, hostile layers, every activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe
from compile_moe import FusedMoEModularKernel, MoEPrepareAndFinalizeNoEP
from tests.support.oracle import ACTIVATIONS, CASES
from tests.support.quantized import ONE_A_SCALING, VARIANTS, Variant, assert_as_accurate, make_quantized
from tests.support.quantized_calls import CALLABLES, EXPERTS, STATIC, kernel_of, run

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FP8 = Variant("fp8_w8a8_tensor")


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
            output.copy_(torch.where(input.abs().sum(-1, keepdim=True) == 0, 1e5, F.silu(gate) * up))

    kernel = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(q.config()), Own(quant_config=q.config()))
    assert_as_accurate(kernel(*q.args), q)


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


@pytest.mark.parametrize(
    ("variant", "backend"), [*((v, None) for v in VARIANTS), *((v, "aot_eager") for v in ONE_A_SCALING)]
)
def test_in_place(variant: str, backend: str | None) -> None:
    q = make_quantized(VARIANTS[variant])
    given = q.layer.hidden_states.clone()
    function = compile_moe.fused_experts
    if backend is not None:
        function = torch.compile(function, fullgraph=True, backend=backend)
    result = function(given, *q.args[1:], quant_config=q.config(), inplace=True)
    assert result.data_ptr() == given.data_ptr()
    assert_as_accurate(given, q)


# TorchExperts' GEMMs are one op, whatever the scheme.
@pytest.mark.parametrize(
    ("variant", "experts"),
    [*((v, "TritonExperts") for v in VARIANTS), *((v, "TorchExperts") for v in ONE_A_SCALING)],
)
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
    # Each rank's rows have a scale of their own, where that is over all rows.
    assert_as_accurate(total, q, same_scales=False)


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
    from compile_moe.prepare_finalize import quantized_input

    seen: list[tuple[int, ...]] = []

    def spy(tokens: Tensor, *args: Any) -> Any:
        seen.append(tuple(tokens.shape))
        return quantize_tokens(tokens, *args)

    monkeypatch.setattr(quantized_input, "quantize_tokens", spy)
    monkeypatch.setattr("compile_moe.experts.quantized.quantize_tokens", spy)
    run(q)
    assert seen == [(9, 48), (27, 40)]


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_expert_is_dequantized_at_a_time(
    variant: str, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none that has no rows."""
    q = make_quantized(VARIANTS[variant], M=20, routing="empty")
    scheme = type(q.variant.made)
    dequantize, seen = scheme.dequantize, []

    def spy(self: Any, weight: Tensor, *args: Any) -> Tensor:
        seen.append(weight.dim())
        return dequantize(self, weight, *args)

    monkeypatch.setattr(scheme, "dequantize", spy)
    run(q, experts)
    assert set(seen) == {2} and len(seen) == 2 * 3
