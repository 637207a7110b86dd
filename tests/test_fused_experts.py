"""The layer against the float64 oracle: hostile layers, dtypes, activations, and layers drawn at random."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import compile_moe
from compile_moe.ops.named_activations import NAMES
from tests.support.oracle import ACTIVATIONS, CASES, Layer, assert_as_accurate, make_layer, swigluoai

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXPERTS = ("fused_experts", "TritonExperts", "TorchExperts")


def run(layer: Layer, experts: str) -> Tensor:
    if experts == "fused_experts":
        return compile_moe.fused_experts(*layer.args, **layer.options)
    kernel = compile_moe.FusedMoEModularKernel(
        compile_moe.MoEPrepareAndFinalizeNoEP(),
        getattr(compile_moe, experts)(w1_bias=layer.w1_bias, w2_bias=layer.w2_bias),
    )
    options = {k: v for k, v in layer.options.items() if not k.endswith("_bias")}
    return kernel(*layer.args, **options)


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", CASES)
def test_layer(case: str, experts: str, dtype: torch.dtype, device: str) -> None:
    layer = make_layer(**CASES[case], dtype=dtype, device=device)
    assert_as_accurate(run(layer, experts), layer)


def test_float64_on_cpu() -> None:
    layer = make_layer(dtype=torch.float64, biased=True)
    torch.testing.assert_close(run(layer, "fused_experts"), layer.reference(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_named_activation(name: str, device: str) -> None:
    layer = make_layer(M=17, activation=name, device=device)
    assert_as_accurate(run(layer, "fused_experts"), layer)


def interleave(function: Any) -> Any:
    return lambda gate_up: function(torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], -1))


PARAMETERS: dict[str, tuple[compile_moe.Activation, Any]] = {
    "interleaved-silu": (
        compile_moe.Activation("silu", interleaved=True),
        interleave(ACTIVATIONS["silu"]),
    ),
    "interleaved-gelu": (
        compile_moe.Activation("gelu", interleaved=True),
        interleave(ACTIVATIONS["gelu"]),
    ),
    "swigluoai-alpha-limit": (
        compile_moe.Activation("swigluoai", alpha=1.1, limit=0.5),
        lambda x: swigluoai(x, 1.1, 0.5),
    ),
    "concatenated-swigluoai": (
        compile_moe.Activation("swigluoai", interleaved=False),
        lambda x: swigluoai(torch.stack(x.chunk(2, -1), -1).flatten(-2)),
    ),
    "silu-alpha-limit": (
        compile_moe.Activation("silu", alpha=1.5, limit=0.7),
        lambda x: (
            (g := x.chunk(2, -1)[0].clamp(max=0.7))
            * torch.sigmoid(1.5 * g)
            * x.chunk(2, -1)[1].clamp(-0.7, 0.7)
        ),
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_activation_with_parameters(name: str, device: str) -> None:
    activation, function = PARAMETERS[name]
    layer = make_layer(M=17, activation=activation, function=function, device=device)
    assert_as_accurate(run(layer, "fused_experts"), layer)


CALLABLES: dict[str, Any] = {
    "pointwise": lambda x: F.silu(x[..., ::2].clamp(max=1.5)) * (x[..., 1::2] + 1),
    "row-wise": lambda x: F.softmax(x.chunk(2, -1)[0], -1) * x.chunk(2, -1)[1],
}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", CALLABLES)
def test_callable(name: str, experts: str, device: str) -> None:
    # So many tokens that errors of one row, whose softmax has a peak, say little.
    layer = make_layer(
        M=67, activation=CALLABLES[name], function=CALLABLES[name], device=device, skipped=True
    )
    assert_as_accurate(run(layer, experts), layer)


def test_inplace_returns_its_input(device: str) -> None:
    layer = make_layer(device=device)
    given_ = layer.hidden_states.clone()
    result = compile_moe.fused_experts(given_, *layer.args[1:], inplace=True)
    assert result is given_
    assert_as_accurate(result, layer)


def test_equal_inputs_give_equal_bits(device: str) -> None:
    layer = make_layer(M=300, K=96, I=64, E=8, topk=3, dtype=torch.bfloat16, device=device)
    first = run(layer, "fused_experts")
    for _ in range(3):
        assert torch.equal(first, run(layer, "fused_experts"))


def test_tokens_do_not_depend_on_each_other(device: str) -> None:
    """A token's result is the same alone and among others, up to the rounding of another tile."""
    layer = make_layer(M=70, device=device)
    whole = run(layer, "fused_experts")
    x, w1, w2, weights, ids = layer.args
    for rows in (slice(0, 1), slice(3, 40)):
        part = compile_moe.fused_experts(x[rows], w1, w2, weights[rows], ids[rows])
        torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-5)


def test_expert_parallel_shards_add_up(device: str) -> None:
    """Two ranks with complementary expert_maps, summed, are the whole layer."""
    layer = make_layer(M=33, E=6, topk=3, device=device)
    x, w1, w2, weights, ids = layer.args
    total = torch.zeros_like(x)
    for rank in range(2):
        expert_map = torch.full((6,), -1, dtype=torch.int32, device=device)
        expert_map[rank::2] = torch.arange(3, dtype=torch.int32, device=device)
        total += compile_moe.fused_experts(x, w1[rank::2], w2[rank::2], weights, ids, expert_map=expert_map)
    torch.testing.assert_close(total, run(layer, "fused_experts"), rtol=1e-5, atol=1e-5)


#: Everything that an activation can be, with the function that the oracle computes.
ANY_ACTIVATION: dict[str, tuple[Any, Any]] = {
    **{name: (name, function) for name, function in ACTIVATIONS.items()},
    **PARAMETERS,
    **{name: (function, function) for name, function in CALLABLES.items()},
}


def draw_layer(data: st.DataObject, device: str) -> Layer:
    torch.manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    e = data.draw(st.integers(1, 9), "E")
    mapped = data.draw(st.booleans(), "mapped")
    topk = data.draw(st.integers(1, min(4, 2 * e if mapped else e)), "topk")
    routing = data.draw(st.sampled_from(["random", "one", "empty", "duplicate"]), "routing")
    activation, function = ANY_ACTIVATION[data.draw(st.sampled_from(sorted(ANY_ACTIVATION)), "activation")]
    return make_layer(
        M=data.draw(st.integers(0, 40) | st.integers(100, 300), "M"),
        K=data.draw(st.integers(1, 70), "K"),
        I=data.draw(st.integers(1, 50), "I"),
        E=e,
        topk=topk,
        dtype=data.draw(st.sampled_from(DTYPES), "dtype"),
        device=device,
        activation=activation,
        function=function,
        routing="random" if routing == "one" and e == 1 else routing,
        transposed=data.draw(st.booleans(), "transposed"),
        biased=data.draw(st.booleans(), "biased"),
        mapped=mapped,
        skipped=data.draw(st.booleans(), "skipped"),
        strided=data.draw(st.booleans(), "strided"),
        ids_dtype=data.draw(st.sampled_from([torch.int32, torch.int64]), "ids"),
        weights_dtype=data.draw(st.sampled_from(DTYPES), "weights"),
        apply_router_weight_on_input=topk == 1 and data.draw(st.booleans(), "on input"),
    )


@settings(max_examples=100)
@given(data=st.data())
def test_any_layer(data: st.DataObject) -> None:
    """Shapes, routings and options drawn at random."""
    layer = draw_layer(data, "cpu")
    assert_as_accurate(run(layer, data.draw(st.sampled_from(EXPERTS), "experts")), layer)


@pytest.mark.gpu
@settings(max_examples=40)
@given(data=st.data())
def test_any_layer_on_cuda(data: st.DataObject) -> None:
    layer = draw_layer(data, "cuda")
    assert_as_accurate(run(layer, data.draw(st.sampled_from(EXPERTS), "experts")), layer)
