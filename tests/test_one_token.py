"""A layer of one token: compiled graphs take the op of two kernels where it is faster, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import compile_moe
from compile_moe.lowering.explain import _epilogue
from compile_moe.ops import one_token_experts, quantized_one_token_experts
from compile_moe.ops.epilogue import parse
from compile_moe.ops.kernels.one_token import launches
from compile_moe.ops.named_activations import program_text
from tests.support.aot import CAPABILITIES
from tests.support.fake_cuda import GeneratedKernels, cuda_empty, generated_kernels
from tests.support.one_token import run_one_token
from tests.support.oracle import CASES, assert_as_accurate, make_layer
from tests.test_kernels_ahead_of_time import SHAPES, compile_launch, empty

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

E, TOPK, K, I = 8, 2, 256, 128
STAGES = ["sort_tokens", "gather_gemm", "scatter_gemm", "weight_and_reduce"]
SILU = program_text("silu")
Function = Callable[..., Any]


def arguments(
    m: int = 1, transposed: bool = False, scale: int = 1, topk: int = TOPK, **options: Any
) -> list[Tensor]:
    options = {"dtype": torch.bfloat16} | options
    w1, w2 = (
        cuda_empty(E, 2 * I * scale, K * scale, **options),
        cuda_empty(E, K * scale, I * scale, **options),
    )
    if transposed:
        w1, w2 = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w1, w2))
    x = cuda_empty(m, K * scale, **options)
    return [x, w1, w2, cuda_empty(m, topk, dtype=torch.float32), cuda_empty(m, topk, dtype=torch.int64)]


def generate(
    function: Function, make: Callable[[], list[Tensor]] = arguments, **options: Any
) -> GeneratedKernels:
    with torch.no_grad():
        return generated_kernels(function, make, joint_graph_constant_folding=False, **options)


def layer(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Tensor:
    return compile_moe.fused_experts(x, w1, w2, weights, ids, **options)


def clamped(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.clamp(max=7)) * up


def written_by_hand(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The activation lies between the stages, and a pass brings it into the epilogue."""
    slots, offsets = compile_moe.ops.sort_tokens(ids, E)
    rows = clamped(compile_moe.ops.gather_gemm(x, w1, slots, offsets, TOPK))
    fused_out = compile_moe.ops.scatter_gemm(rows, w2, slots, offsets, 1, TOPK)
    return compile_moe.ops.weight_and_reduce(fused_out, weights, ids, None, E)


def block(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, norm: Tensor) -> Tensor:
    weights, ids = (x @ router.t()).float().softmax(-1).topk(TOPK)
    return F.rms_norm(x + layer(x, w1, w2, weights, ids), norm.shape, norm)


def block_arguments() -> list[Tensor]:
    x, w1, w2, *_ = arguments()
    return [x, cuda_empty(E, K), w1, w2, cuda_empty(K)]


SERVED: dict[str, tuple[Function, dict[str, Any]]] = {
    "plain": (layer, {}),
    "callable": (lambda *args: layer(*args, activation=clamped), {}),
    "by hand": (written_by_hand, {}),
    "mapped": (lambda *args: layer(*args, expert_map=torch.arange(E, device="cuda")), {}),
    "float16": (layer, {"dtype": torch.float16}),
}
NOT_SERVED: dict[str, tuple[Function, dict[str, Any]]] = {
    "two tokens": (layer, {"m": 2}),
    "transposed": (layer, {"transposed": True}),
    "float32": (layer, {"dtype": torch.float32}),
    "one expert a token": (layer, {"topk": 1}),
    "large": (layer, {"scale": 36}),
}


@pytest.mark.parametrize("case", SERVED)
def test_one_op(case: str) -> None:
    function, options = SERVED[case]
    generated = generate(function, lambda: arguments(**options))
    assert generated.op_calls == ["one_token_experts"]


@pytest.mark.parametrize("case", NOT_SERVED)
def test_the_stages(case: str) -> None:
    function, options = NOT_SERVED[case]
    generated = generate(function, lambda: arguments(**options))
    assert [name.removesuffix(".out") for name in generated.op_calls] == STAGES


def test_dynamic_tokens_take_the_stages() -> None:
    generated = generate(layer, lambda: arguments(m=8), dynamic_dims=[(0, 0), (3, 0), (4, 0)])
    assert "one_token_experts" not in generated.op_calls


def test_stages_that_something_else_reads() -> None:
    def both(*args: Tensor) -> tuple[Tensor, Tensor]:
        x, w1, w2, weights, ids = args
        slots, offsets = compile_moe.ops.sort_tokens(ids, E)
        rows = compile_moe.ops.gather_gemm(x, w1, slots, offsets, TOPK, None, SILU)
        fused_out = compile_moe.ops.scatter_gemm(rows, w2, slots, offsets, 1, TOPK)
        return compile_moe.ops.weight_and_reduce(fused_out, weights, ids, None, E), fused_out

    assert "one_token_experts" not in generate(both).op_calls


@pytest.mark.parametrize("case", ["columns", "topk"])
def test_layers_that_the_op_refuses(case: str) -> None:
    """The stages leave to their caller that a layer returns as many columns as it takes, and what ids there are."""
    topk = TOPK if case == "columns" else E + 1

    def make() -> list[Tensor]:
        x, w1, w2, weights, ids = arguments(topk=topk)
        return [x, w1, cuda_empty(E, 2 * K, I, dtype=w2.dtype) if case == "columns" else w2, weights, ids]

    def by_hand(*args: Tensor) -> Tensor:
        x, w1, w2, weights, ids = args
        slots, offsets = compile_moe.ops.sort_tokens(ids, E)
        rows = compile_moe.ops.gather_gemm(x, w1, slots, offsets, topk, None, SILU)
        fused_out = compile_moe.ops.scatter_gemm(rows, w2, slots, offsets, 1, topk)
        return compile_moe.ops.weight_and_reduce(fused_out, weights, ids, None, E)

    assert [name.removesuffix(".out") for name in generate(by_hand, make).op_calls] == STAGES


@pytest.mark.parametrize("op", [one_token_experts, quantized_one_token_experts])
def test_the_epilogue_that_explain_names(op: torch._ops.OpOverload) -> None:
    """By position, by name, and none."""
    graph = fx.Graph()
    names = [p.name for p in op._schema.arguments]
    required, position = (
        [None] * sum(not p.has_default_value() for p in op._schema.arguments),
        names.index("epilogue"),
    )
    calls = [
        graph.call_function(op, (*[None] * position, SILU)),
        graph.call_function(op, tuple(required), {"epilogue": SILU}),
        graph.call_function(op, tuple(required)),
    ]
    assert list(map(_epilogue, calls)) == [SILU, SILU, ""]


def test_slots_of_another_sort() -> None:
    def mixed(*args: Tensor) -> Tensor:
        x, w1, w2, weights, ids = args
        slots, offsets = compile_moe.ops.sort_tokens(ids, E)
        rows = compile_moe.ops.gather_gemm(x, w1, slots, offsets, TOPK, None, SILU)
        fused_out = compile_moe.ops.scatter_gemm(rows, w2, slots, offsets, 1, TOPK)
        return compile_moe.ops.weight_and_reduce(fused_out, weights, ids.flip(1), None, E)

    assert "one_token_experts" not in generate(mixed).op_calls


def test_kernels_of_a_block() -> None:
    """Behind the router's product: the router, the two kernels of the op, and residual with norm."""
    generated = generate(block, block_arguments)
    assert [name.removesuffix(".out") for name in generated.op_calls] == ["route_tokens", "one_token_experts"]
    assert len(generated.triton_kernels) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights(dtype: torch.dtype) -> None:
    """As transformers' routers round them: to the tokens' dtype in the kernel, to another one in front of it."""

    def rounded(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return layer(x, w1, w2, weights.to(dtype), ids)

    generated = generate(rounded)
    assert generated.op_calls == ["one_token_experts"]
    assert len(generated.triton_kernels) == (0 if dtype is torch.bfloat16 else 1)


def test_on_a_cpu() -> None:
    """On a CPU a compiled layer of one token has stages as any other."""
    made = make_layer(M=1, dtype=torch.bfloat16)
    names = [kernel.name for kernel in compile_moe.explain(layer, *made.args).kernels]
    assert names[:3] == [f"compile_moe.{name}" for name in STAGES[:3]]


#: Elsewhere than on Hopper what takes the most registers: the biased shape, and elements that are loaded one by one.
COMPILED = [
    (shape, capability)
    for shape in SHAPES
    for capability in CAPABILITIES
    if capability == 90 or shape in ("gpt-oss-120b", "odd")
]


@pytest.mark.parametrize(("shape", "capability"), COMPILED)
def test_kernels_ahead_of_time(shape: str, capability: int) -> None:
    e, topk, k, i = SHAPES[shape]
    biased = shape == "gpt-oss-120b"
    program = parse(program_text("swigluoai" if biased else "silu"))
    bf16 = {"dtype": torch.bfloat16}
    out, w1, w2 = empty(1, k, **bf16), empty(e, 2 * i, k, **bf16), empty(e, k, i, **bf16)
    every = launches.launches_for(
        out,
        empty(topk, i, **bf16),
        empty(1, k, **bf16),
        w1,
        w2,
        empty(1, topk, dtype=torch.float32),
        empty(1, topk, dtype=torch.int64),
        empty(e, dtype=torch.int64) if biased else None,
        empty(e, 2 * i, **bf16) if biased else None,
        empty(e, k, **bf16) if biased else None,
        program.triton_source(),
        program.layout,
        True,
        not biased,
    )
    for launch in every:
        # Registers are those of three programs, of which masks, and other assemblers than sm_90's, spill some.
        compile_launch(launch, capability, spills=48 if capability != 90 else 8 * biased)


@pytest.mark.gpu
def test_transposed_weights_on_a_gpu() -> None:
    """The op takes any strides; compiled graphs don't call it with these."""
    sizes = {"M": 1, "K": 256, "I": 96, "dtype": torch.bfloat16, "device": "cuda"}
    made = make_layer(**CASES["transposed-biased-swigluoai"] | sizes)
    assert_as_accurate(run_one_token(made), made)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["plain", "biased", "mapped-int32-biased", "skipped", "ungated"])
def test_compiled_on_a_gpu(case: str) -> None:
    """As accurate as PyTorch, also replayed as a CUDA graph with other inputs."""
    sizes = {"M": 1, "K": 256, "I": 96, "dtype": torch.bfloat16, "device": "cuda"}
    made, other = (make_layer(**CASES[case] | sizes) for _ in range(2))

    def run(*args: Tensor) -> Tensor:
        return compile_moe.fused_experts(*args, **made.options)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True)
        assert_as_accurate(compiled(*made.args), made)
        assert [k.name for k in compile_moe.explain(run, *made.args).kernels] == [
            "compile_moe.one_token_experts"
        ]
        static = [t.clone() for t in made.args]
        graph = torch.cuda.CUDAGraph()
        compiled(*static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = compiled(*static)
        for old, new in zip(static, other.args, strict=True):
            old.copy_(new)
        graph.replay()
        expected = compile_moe.fused_experts(*other.args, **made.options)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
