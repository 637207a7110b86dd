"""Activations that a model writes between the GEMMs end in GEMM 1's epilogue, whatever they are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe
from compile_moe.lowering.fuse_epilogue import refusals
from compile_moe.ops import gather_gemm, scatter_gemm, sort_tokens
from tests.support.fake_cuda import GeneratedKernels, cuda_empty, generated_kernels
from tests.support.oracle import assert_as_accurate, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

M, K, I, E, TOPK = 16, 64, 48, 4, 2
Activation = Callable[[Tensor], Any]


def stages(activation: Activation) -> Callable[..., Any]:
    """The two GEMMs with an activation that PyTorch computes between them."""

    def function(x: Tensor, w1: Tensor, w2: Tensor, ids: Tensor) -> Any:
        slots, offsets = sort_tokens(ids, E)
        hidden = activation(gather_gemm(x, w1, slots, offsets, TOPK))
        return scatter_gemm(hidden, w2, slots, offsets, ids.size(0), TOPK)

    return function


def arguments(columns: int = 2 * I) -> list[Tensor]:
    return [
        cuda_empty(M, K),
        cuda_empty(E, columns, K),
        cuda_empty(E, K, I),
        cuda_empty(M, TOPK, dtype=torch.int64),
    ]


def generate(function: Callable[..., Any], dynamic: bool = False, **options: Any) -> GeneratedKernels:
    refusals.clear()
    with torch.no_grad():
        return generated_kernels(
            function,
            lambda: arguments(**options),
            [(0, 0), (3, 0)] if dynamic else (),
            # Folding would compute constants on the GPU that isn't there.
            joint_graph_constant_folding=False,
        )


def assert_fused(generated: GeneratedKernels) -> None:
    assert generated.triton_kernels == [] and refusals == []
    assert generated.op_calls == ["sort_tokens", "gather_gemm", "scatter_gemm"]


WRITTEN: dict[str, Activation] = {
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "clamped": lambda x: F.silu(x[:, :I].clamp(max=7)) * (x[:, I:].clamp(-7, 7) + 1),
    "interleaved": lambda x: x[..., ::2] * torch.sigmoid(1.7 * x[..., ::2]) * (x[..., 1::2] + 1),
    "in float32": lambda x: (F.gelu(x.float()[:, :I]) * x.float()[:, I:]).to(x.dtype),
    "split": lambda x: operator.mul(*x.split(I, dim=-1)),
    "where": lambda x: torch.where(x[:, :I] > 0, x[:, I:], x[:, :I]),
    "constants": lambda x: torch.maximum(x[:, :I], torch.zeros_like(x[:, :I])) * x[:, I:],
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", WRITTEN)
def test_written_between_the_gemms(name: str, dynamic: bool) -> None:
    assert_fused(generate(stages(WRITTEN[name]), dynamic))


def test_ungated() -> None:
    assert_fused(generate(stages(lambda x: F.relu(x).square()), columns=I))


UNARY = (
    torch.sigmoid,
    torch.tanh,
    torch.exp,
    torch.abs,
    F.silu,
    F.gelu,
    F.softplus,
    lambda x: x.clamp(-1, 2),
    torch.neg,
)
BINARY = (torch.add, torch.sub, torch.mul, torch.maximum, lambda a, b: torch.where(a > b, a, b * 0.5))
EXPRESSIONS = st.recursive(
    st.sampled_from(["gate", "up"]),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(range(len(UNARY))), inner),
        st.tuples(st.sampled_from(range(len(BINARY))), inner, inner),
    ),
    max_leaves=6,
)


def evaluate(expression: Any, gate: Tensor, up: Tensor) -> Tensor:
    if isinstance(expression, str):
        return gate if expression == "gate" else up
    if len(expression) == 2:
        return UNARY[expression[0]](evaluate(expression[1], gate, up))
    return BINARY[expression[0]](*(evaluate(operand, gate, up) for operand in expression[1:]))


@hypothesis.settings(max_examples=12)
@hypothesis.given(expression=EXPRESSIONS, interleaved=st.booleans())
def test_random_expressions(expression: Any, interleaved: bool) -> None:
    def activation(x: Tensor) -> Tensor:
        halves = (x[:, ::2], x[:, 1::2]) if interleaved else x.chunk(2, -1)
        return evaluate(expression, *halves) * halves[1]

    torch._dynamo.reset()
    assert_fused(generate(stages(activation)))


@hypothesis.settings(max_examples=6)
@hypothesis.given(expression=EXPRESSIONS)
def test_numerics_of_random_expressions(expression: Any) -> None:
    """On the CPU, whose ops evaluate the same programs."""

    def activation(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return evaluate(expression, gate, up) * 0.5

    torch._dynamo.reset()
    refusals.clear()
    generator = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(s, generator=generator) / 8 for s in ((M, K), (E, 2 * I, K), (E, K, I)))
    ids = torch.randint(E, (M, TOPK), generator=generator)
    function = stages(activation)
    with torch.no_grad():
        result = torch.compile(function, fullgraph=True)(x, w1, w2, ids)
        torch.testing.assert_close(result, function(x, w1, w2, ids), rtol=1e-4, atol=1e-5)
    assert refusals == []


class OwnActivation(compile_moe.TritonExperts):
    """Overrides the published method, which writes into a buffer."""

    def activation(self, activation: Any, output: Tensor, input: Tensor) -> None:
        gate, up = input.chunk(2, -1)
        output.copy_(torch.tanh(gate) * up)


def test_overridden_activation_method() -> None:
    kernel = compile_moe.FusedMoEModularKernel(compile_moe.MoEPrepareAndFinalizeNoEP(), OwnActivation())

    def function(x: Tensor, w1: Tensor, w2: Tensor, ids: Tensor) -> Tensor:
        return kernel(x, w1, w2, ids.float(), ids)

    generated = generate(function)
    assert refusals == [] and len(generated.triton_kernels) == 1, generated.triton_kernels  # finalize
    assert generated.op_calls == ["sort_tokens", "gather_gemm", "scatter_gemm"]


def test_overridden_activation_method_numerics() -> None:
    layer = make_layer(
        M=9, K=32, I=24, skipped=True, function=lambda x: torch.tanh(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    )
    kernel = compile_moe.FusedMoEModularKernel(compile_moe.MoEPrepareAndFinalizeNoEP(), OwnActivation())
    refusals.clear()
    with torch.no_grad():
        assert_as_accurate(torch.compile(kernel, fullgraph=True)(*layer.args), layer)
    assert refusals == []


def quantized(x: Tensor) -> Tensor:
    y = F.silu(x[:, :I]) * x[:, I:]
    return (y / y.abs().amax(-1, keepdim=True)).to(x.dtype)


REFUSED: dict[str, tuple[Activation, str]] = {
    "softmax": (lambda x: x.softmax(-1)[:, :I], "not a pointwise operation"),
    "shifted": (lambda x: x[:, 1 : I + 1] * x[:, I:], "uses columns 1:49:1 of 96"),
    "other tensor": (
        lambda x: x[:, :I] * torch.arange(I, device="cuda").to(x.dtype) * x[:, I:],
        "takes other tensors",
    ),
    "power": (lambda x: x[:, :I] * x[:, I:].abs() ** 1.5, "raises to a power"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_stopped_them(name: str) -> None:
    activation, reason = REFUSED[name]
    generated = generate(stages(activation))
    assert len(generated.triton_kernels) >= 1
    assert generated.op_calls == ["sort_tokens", "gather_gemm", "scatter_gemm"]
    assert len(refusals) == 1 and reason in refusals[0], refusals


def test_what_follows_a_reduction_stays_outside() -> None:
    """silu and product go into the epilogue, the normalisation behind them does not."""
    generated = generate(stages(quantized))
    assert len(generated.triton_kernels) == 1 and refusals == []
    assert "amax" in generated.triton_kernels[0] and "silu" not in generated.triton_kernels[0]


def test_gate_and_up_used_elsewhere() -> None:
    def function(x: Tensor, w1: Tensor, w2: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        slots, offsets = sort_tokens(ids, E)
        gate_up = gather_gemm(x, w1, slots, offsets, TOPK)
        hidden = F.silu(gate_up[:, :I]) * gate_up[:, I:]
        return gate_up, scatter_gemm(hidden, w2, slots, offsets, M, TOPK)

    assert len(generate(function).triton_kernels) == 1
    assert len(refusals) == 1
