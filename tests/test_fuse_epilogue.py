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
from tests.support import pointwise
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


#: Each activation with its own w1; in one graph, since compiling takes longer than translating.
Several = dict[str, Activation]


def all_stages(activations: Several) -> Callable[..., list[Any]]:
    def function(x: Tensor, w2: Tensor, ids: Tensor, *w1: Tensor) -> list[Any]:
        slots, offsets = sort_tokens(ids, E)
        results = []
        for activation, w in zip(activations.values(), w1, strict=True):
            hidden = activation(gather_gemm(x, w, slots, offsets, TOPK)).to(x.dtype)
            results.append(scatter_gemm(hidden, w2, slots, offsets, ids.size(0), TOPK))
        return results

    return function


def columns(name: str) -> int:
    return I if "ungated" in name else 2 * I


def assert_all_fused(activations: Several, dynamic: bool = False) -> None:
    def make() -> list[Tensor]:
        ids = cuda_empty(M, TOPK, dtype=torch.int64)
        return [
            cuda_empty(M, K),
            cuda_empty(E, K, I),
            ids,
            *(cuda_empty(E, columns(n), K) for n in activations),
        ]

    torch._dynamo.reset()
    refusals.clear()
    with torch.no_grad():
        generated = generated_kernels(
            all_stages(activations),
            make,
            [(0, 0), (2, 0)] if dynamic else (),
            joint_graph_constant_folding=False,
        )
    assert generated.triton_kernels == [] and refusals == []
    assert generated.op_calls[0] == "sort_tokens"
    assert sorted(generated.op_calls[1:]) == sorted(["gather_gemm", "scatter_gemm"] * len(activations))


def assert_all_exact(activations: Several) -> None:
    """On the CPU, whose ops evaluate the same programs, against the activations in float64."""
    torch._dynamo.reset()
    refusals.clear()
    x, w2 = torch.randn(M, K), torch.randn(E, K, I) / 7
    ids = torch.randint(E, (M, TOPK))
    w1 = [torch.randn(E, columns(name), K) / 8 for name in activations]
    with torch.no_grad():
        results = torch.compile(all_stages(activations), fullgraph=True)(x, w2, ids, *w1)
        assert refusals == []
        slots, offsets = sort_tokens(ids, E)
        for (name, activation), w, result in zip(activations.items(), w1, results, strict=True):
            hidden = activation(gather_gemm(x, w, slots, offsets, TOPK).double()).to(x.dtype)
            expected = scatter_gemm(hidden, w2, slots, offsets, M, TOPK)
            torch.testing.assert_close(
                result,
                expected,
                rtol=1e-4,
                atol=1e-5 * expected.nan_to_num().abs().max().item(),
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_pointwise_functions(dynamic: bool) -> None:
    # Dynamic sizes change nothing in the epilogue's text: a tenth of the functions.
    names = sorted(pointwise.ALL)[:: 10 if dynamic else 1]
    assert_all_fused({name: pointwise.ALL[name] for name in names}, dynamic)


def test_numerics_of_pointwise_functions() -> None:
    assert_all_exact(pointwise.ALL)


ACTIVATIONS = st.lists(
    st.tuples(st.sampled_from(sorted(pointwise.SPLITS)), pointwise.EXPRESSIONS).filter(
        # All columns as they are: nothing to fuse.
        lambda drawn: drawn not in (("ungated", "gate"), ("ungated", "up"))
    ),
    min_size=5,
    max_size=10,
)


def random_activations(drawn: list[tuple[str, Any]]) -> Several:
    return {
        f"{i}: {split}, {expression}": pointwise.activation_of(split, expression)
        for i, (split, expression) in enumerate(drawn)
    }


@hypothesis.settings(max_examples=5)
@hypothesis.given(drawn=ACTIVATIONS)
def test_random_expressions(drawn: list[tuple[str, Any]]) -> None:
    assert_all_fused(random_activations(drawn))


@hypothesis.settings(max_examples=4)
@hypothesis.given(drawn=ACTIVATIONS)
def test_numerics_of_random_expressions(drawn: list[tuple[str, Any]]) -> None:
    assert_all_exact(random_activations(drawn))


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


class DoubledActivation(compile_moe.TritonExperts):
    """Does something to what the published method computes."""

    def activation(self, activation: Any, output: Tensor, input: Tensor) -> None:
        super().activation(activation, output, input)
        output.mul_(2)


@pytest.mark.parametrize(
    "activation",
    ["silu", "swigluoai", "relu2_no_mul", compile_moe.Activation("gelu", interleaved=True)],
    ids=str,
)
def test_the_layers_own_activation(activation: Any) -> None:
    kernel = compile_moe.FusedMoEModularKernel(compile_moe.MoEPrepareAndFinalizeNoEP(), DoubledActivation())
    ungated = activation == "relu2_no_mul"

    def function(x: Tensor, w1: Tensor, w2: Tensor, ids: Tensor) -> Tensor:
        w1 = w1[:, :I] if ungated else w1
        return kernel(x, w1, w2, ids.float(), ids, activation=activation)

    generated = generate(function)
    assert refusals == [] and len(generated.triton_kernels) == 1, generated.triton_kernels  # finalize
    assert generated.op_calls == ["sort_tokens", "gather_gemm", "scatter_gemm"]
    layer = make_layer(M=9, K=32, I=24, activation="relu2_no_mul" if ungated else "silu")
    with torch.no_grad():
        call = torch.compile(kernel, fullgraph=True)
        result = call(*layer.args, activation=activation)
        torch.testing.assert_close(result, kernel(*layer.args, activation=activation))


def quantized(x: Tensor) -> Tensor:
    y = F.silu(x[:, :I]) * x[:, I:]
    return (y / y.abs().amax(-1, keepdim=True)).to(x.dtype)


REFUSED: dict[str, tuple[Activation, str]] = {
    "softmax": (lambda x: x.softmax(-1)[:, :I], "not a pointwise operation"),
    "shifted": (lambda x: x[:, 1 : I + 1] * x[:, I:], "combines elements 0 and 1 of gate and up"),
    "other tensor": (
        lambda x: x[:, :I] * torch.arange(I, device="cuda").to(x.dtype) * x[:, I:],
        "takes other tensors",
    ),
    "integers": (lambda x: x[:, :I].int() * x[:, I:], "casts to torch.int32"),
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


def test_constant() -> None:
    """No GEMM 1 is left that could compute it."""
    generated = generate(stages(lambda x: torch.ones_like(x[:, :I])))
    assert generated.op_calls == ["sort_tokens", "scatter_gemm"] and len(generated.triton_kernels) == 1
    assert len(refusals) == 1 and "reads no gate and no up" in refusals[0], refusals


@pytest.mark.parametrize("half", [0, 1], ids=["gate", "up"])
def test_half_of_the_columns(half: int) -> None:
    """Nothing is computed from it, but GEMM 1 need not store the other half."""
    assert_fused(generate(stages(lambda x: x.chunk(2, -1)[half])))


def test_region_ends_where_an_epilogue_does() -> None:
    """What is behind the activation moves columns; the activation is fused nevertheless."""
    generated = generate(stages(lambda x: (F.silu(x[:, :I]) * x[:, I:]).flip(-1)))
    assert len(generated.triton_kernels) == 1 and "silu" not in generated.triton_kernels[0]
    assert refusals == []
