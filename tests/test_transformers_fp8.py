"""FP8 experts of Hugging Face transformers through the library: the module, with every kind of weights and scales."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import compile_moe.integrations.transformers as integration
from compile_moe.quantization import QuantizedWeights
from tests.support.quantized import Quantized, Variant, assert_as_accurate, make_quantized

pytest.importorskip("transformers")
integration.register()

BLOCK = (16, 24)
E8M0 = torch.float8_e8m0fnu


@pytest.fixture(autouse=True)
def forward_only() -> Any:
    with torch.no_grad():
        yield


def fp8_experts(
    q1: QuantizedWeights,
    q2: QuantizedWeights,
    block_size: tuple[int, int] | None = None,
    static: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """The module that transformers makes, with the given weights and scales."""
    from transformers.integrations import finegrained_fp8 as fp8
    from transformers.integrations.moe import use_experts_implementation

    packed = 2 if q2.weight.dtype is torch.int8 else 1
    num_experts, hidden_size, intermediate_size = *q2.weight.shape[:2], q2.weight.size(2) * packed
    has_gate = q1.weight.size(1) == 2 * intermediate_size
    config = types.SimpleNamespace(
        hidden_size=hidden_size,
        num_experts=num_experts,
        moe_intermediate_size=intermediate_size,
        hidden_act="silu",
        _experts_implementation=integration.NAME,
    )
    decorated = use_experts_implementation(
        experts_class=fp8.FP8Experts,
        experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS,
        has_gate=has_gate,
    )
    with torch.device(q1.weight.device):
        experts = decorated(config, block_size, "static" if static else "dynamic", has_gate=has_gate)
    for name, q in (("gate_up_proj" if has_gate else "up_proj", q1), ("down_proj", q2)):
        set_parameter(experts, name, q.weight)
        set_parameter(experts, f"{name}_scale_inv", q.scale)
    if static:
        set_parameter(experts, "gate_up_proj_activation_scale", static[0])
        set_parameter(experts, "down_proj_activation_scale", static[1])
    return experts


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    assert hasattr(module, name)
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def routed(quantized: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    x, _, _, weights, ids = quantized.args
    return x, ids, weights


def stands_for(quantized: Quantized, q1: QuantizedWeights, q2: QuantizedWeights) -> Quantized:
    """The layer with other quantized weights."""
    quantized.q1, quantized.q2 = q1, q2
    dequantize = quantized.variant.dequantize
    quantized.layer.w1, quantized.layer.w2 = (dequantize(q, torch.float64) for q in (q1, q2))
    return quantized


def blocks(**options: Any) -> tuple[Quantized, Any]:
    q = make_quantized(Variant("fp8_w8a8_block", (("block_shape", BLOCK),)), **options)
    return q, fp8_experts(q.q1, q.q2, BLOCK)


def blocks_of_powers(**options: Any) -> tuple[Quantized, Any]:
    q = make_quantized(Variant("fp8_w8a8_block", (("block_shape", BLOCK),)), **options)
    powers = [p._replace(scale=p.scale.log2().ceil().exp2()) for p in (q.q1, q.q2)]
    stored = [p._replace(scale=p.scale.to(E8M0)) for p in powers]
    return stands_for(q, *powers), fp8_experts(*stored, BLOCK)


def tensors(halves: int = 1, is_static: bool = False, **options: Any) -> tuple[Quantized, Any]:
    """One scale an expert, or one for gate and one for up."""
    q = make_quantized(Variant("fp8_w8a8_channel"), **options)
    num_experts, n, _ = q.q1.weight.shape
    scale = q.q1.scale.view(num_experts, halves, n // halves, 1).amax(2)
    stored = q.q1._replace(scale=scale), q.q2._replace(scale=q.q2.scale.amax(1, keepdim=True))
    rows = [
        p._replace(scale=p.scale.repeat_interleave(p.weight.size(1) // p.scale.size(1), 1)) for p in stored
    ]
    ones = torch.ones(num_experts, device=scale.device)
    return stands_for(q, *rows), fp8_experts(*stored, static=(ones, ones) if is_static else None)


def halves(**options: Any) -> tuple[Quantized, Any]:
    return tensors(2, **options)


def halves_static(**options: Any) -> tuple[Quantized, Any]:
    """No scheme has static scales beside these: tokens get their own."""
    return tensors(2, is_static=True, **options)


def static(**options: Any) -> tuple[Quantized, Any]:
    q = make_quantized(Variant("fp8_w8a8_tensor"), static="each", **options)
    assert q.a1_scale is not None and q.a2_scale is not None
    q.a1_scale, q.a2_scale = (scale.to(q.q1.scale.device) for scale in (q.a1_scale, q.a2_scale))
    stored = [p._replace(scale=p.scale.view(-1, 1, 1)) for p in (q.q1, q.q2)]
    return q, fp8_experts(*stored, static=(q.a1_scale, q.a2_scale))


def pairs(**options: Any) -> tuple[Quantized, Any]:
    q = make_quantized(Variant("mxfp4_w4a16"), **options)
    return q, fp8_experts(
        *(QuantizedWeights(p.weight.view(torch.int8), p.scale.view(E8M0)) for p in (q.q1, q.q2))
    )


KINDS = {
    "blocks": blocks,
    "blocks-e8m0": blocks_of_powers,
    "tensors": tensors,
    "gate-and-up": halves,
    "gate-and-up-static": halves_static,
    "tensors-static": static,
    "fp4": pairs,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("tokens", [9, 1, 0])
def test_module(kind: str, tokens: int, device: str) -> None:
    q, experts = KINDS[kind](M=tokens, skipped=True, device=device)
    assert_as_accurate(experts(*routed(q)), q)


@each_kind
def test_in_bf16(kind: str, device: str) -> None:
    q, experts = KINDS[kind](M=33, dtype=torch.bfloat16, device=device)
    assert_as_accurate(experts(*routed(q)), q)


@pytest.mark.parametrize("kind", ["blocks", "tensors", "tensors-static"])
def test_ungated(kind: str, device: str) -> None:
    q, experts = KINDS[kind](activation="silu_no_mul", device=device)
    assert not experts.has_gate
    assert_as_accurate(experts(*routed(q)), q)


@pytest.mark.usefixtures("fresh_dynamo")
@each_kind
def test_one_compile_for_all_token_counts(kind: str, device: str) -> None:
    first, experts = KINDS[kind](M=7, device=device)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(experts, fullgraph=True, backend=counter)
    for m in (7, 2, 33):
        more, _ = KINDS[kind](M=m, device=device)
        more.a1_scale, more.a2_scale = first.a1_scale, first.a2_scale
        arguments = routed(stands_for(more, first.q1, first.q2))
        if m == 7:
            for argument in arguments:
                torch._dynamo.mark_dynamic(argument, 0)
        assert_as_accurate(compiled(*arguments), more)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "message"),
    [
        ("blocks", "gate_up_proj", torch.bfloat16, r"modules_to_not_convert.*dequantize=True"),
        ("blocks", "down_proj", torch.int8, r"float8_e8m0fnu for torch.int8 weights, got torch.float32"),
        ("blocks", "down_proj_scale_inv", torch.bfloat16, r"float32 or float8_e8m0fnu .* got torch.bfloat16"),
        ("fp4", "down_proj_scale_inv", torch.float32, r"must be float8_e8m0fnu for torch.int8"),
        ("fp4", "down_proj", torch.float8_e4m3fn, r"holds torch.int8 and torch.float8_e4m3fn weights"),
    ],
)
def test_other_dtypes_are_refused(kind: str, name: str, dtype: torch.dtype, message: str) -> None:
    q, experts = KINDS[kind]()
    set_parameter(experts, name, getattr(experts, name).float().to(dtype))
    with pytest.raises(TypeError, match=message):
        experts(*routed(q))


def test_scales_of_other_shapes_are_refused() -> None:
    q, experts = tensors()
    set_parameter(experts, "down_proj_scale_inv", torch.ones(5, 3, 1))
    with pytest.raises(ValueError, match=r"\(E, 1, 1\) or \(E, 2, 1\), got \(5, 3, 1\)"):
        experts(*routed(q))
    q, experts = blocks()
    set_parameter(experts, "down_proj_scale_inv", torch.ones(5, 3, 1))
    with pytest.raises(ValueError, match="w2_scale"):
        experts(*routed(q))
