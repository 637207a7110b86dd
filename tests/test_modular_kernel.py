"""The modular kernel keeps the published names, orders, defaults and contracts, and computes what the oracle does."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compile_moe
from compile_moe import (
    BatchedPrepareAndFinalize,
    BatchedTorchExperts,
    BatchedTritonExperts,
    FusedMoEModularKernel,
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    MoEPrepareAndFinalizeNoEP,
    TorchExperts,
    TritonExperts,
    _moe_problem_size,
)
from tests.support.oracle import CASES, Layer, assert_as_accurate, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EXPERTS = {"triton": TritonExperts, "torch": TorchExperts}

_APPLY = (
    "self, hidden_states, w1, w2, topk_ids, activation, global_num_experts, expert_map, w1_scale, w2_scale, w1_zp, "
    "w2_zp, a1q_scale, a2_scale, workspace13, workspace2, expert_num_tokens"
)
_PREPARE = "self, a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input"
_FINALIZE = "self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input"
_WORKSPACE_SHAPES = "self, a, M, N, K, topk, num_experts"

#: The published parameters, in order, with their defaults, written as a function's parameter list.
PUBLISHED: dict[str, tuple[Callable[..., Any], str]] = {
    "_moe_problem_size": (_moe_problem_size, "a1, w1, w2, topk_ids"),
    "kernel": (FusedMoEModularKernel.__init__, "self, prepare_finalize, fused_experts"),
    "forward": (
        FusedMoEModularKernel.forward,
        "self, hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation='silu', "
        "global_num_experts=-1, expert_map=None, w1_scale=None, w2_scale=None, w1_zp=None, w2_zp=None, "
        "a1_scale=None, a2_scale=None, apply_router_weight_on_input=False",
    ),
    "prepare": (FusedMoEPrepareAndFinalize.prepare, _PREPARE),
    "finalize": (FusedMoEPrepareAndFinalize.finalize, _FINALIZE),
    "workspace_shapes": (FusedMoEPermuteExpertsUnpermute.workspace_shapes, _WORKSPACE_SHAPES),
    "activation": (FusedMoEPermuteExpertsUnpermute.activation, "self, activation, output, input"),
    "apply": (FusedMoEPermuteExpertsUnpermute.apply, _APPLY),
    "no-ep-prepare": (MoEPrepareAndFinalizeNoEP.prepare, _PREPARE),
    "no-ep-finalize": (MoEPrepareAndFinalizeNoEP.finalize, _FINALIZE),
    "triton-apply": (TritonExperts.apply, _APPLY),
    "triton-workspace_shapes": (TritonExperts.workspace_shapes, _WORKSPACE_SHAPES),
    "torch-apply": (TorchExperts.apply, _APPLY),
    "torch-workspace_shapes": (TorchExperts.workspace_shapes, _WORKSPACE_SHAPES),
    "batched-prepare": (BatchedPrepareAndFinalize.prepare, _PREPARE),
    "batched-finalize": (BatchedPrepareAndFinalize.finalize, _FINALIZE),
    "batched-triton-apply": (BatchedTritonExperts.apply, _APPLY),
    "batched-triton-workspace_shapes": (BatchedTritonExperts.workspace_shapes, _WORKSPACE_SHAPES),
    "batched-torch-apply": (BatchedTorchExperts.apply, _APPLY),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name: str) -> None:
    function, expected = PUBLISHED[name]
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    given = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert ", ".join(given) == expected


def test_base_classes_ask_for_the_published_methods_only() -> None:
    """A subclass written for the published interface must be complete here too."""
    assert issubclass(FusedMoEPrepareAndFinalize, ABC) and issubclass(FusedMoEPermuteExpertsUnpermute, ABC)
    assert FusedMoEPrepareAndFinalize.__abstractmethods__ == {"prepare", "finalize"}
    assert FusedMoEPermuteExpertsUnpermute.__abstractmethods__ == {"workspace_shapes", "apply"}


def test_kernel_is_a_module_that_keeps_its_parts() -> None:
    parts, experts = MoEPrepareAndFinalizeNoEP(), TritonExperts()
    kernel = FusedMoEModularKernel(parts, experts)
    assert isinstance(kernel, nn.Module)
    assert kernel.prepare_finalize is parts and kernel.fused_experts is experts
    assert not list(kernel.parameters()), "weights are arguments of forward"


@pytest.mark.parametrize(
    ("a1", "w1", "w2", "expected"),
    [
        pytest.param((9, 48), (5, 80, 48), (5, 48, 40), (5, 9, 80, 48, 2), id="tokens"),
        pytest.param((0, 48), (5, 80, 48), (5, 48, 40), (5, 0, 80, 48, 2), id="no-tokens"),
        pytest.param((5, 16, 48), (5, 80, 48), (5, 48, 40), (5, 16, 80, 48, 2), id="batched"),
        pytest.param((9, 48), (5, 80, 24), (5, 48, 20), (5, 9, 80, 48, 2), id="int4-packed"),
        pytest.param((9, 48), (5, 40, 48), (5, 48, 40), (5, 9, 40, 48, 2), id="ungated"),
    ],
)
def test_problem_size(
    a1: tuple[int, ...], w1: tuple[int, ...], w2: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    ids = torch.zeros(a1[0] if len(a1) == 2 else 9, 2, dtype=torch.int64)
    for device in ("cpu", "meta"):
        x, up, down = (torch.empty(s, device=device) for s in (a1, w1, w2))
        assert _moe_problem_size(x, up, down, ids.to(device)) == expected


def run(kernel: nn.Module, layer: Layer, **options: Any) -> Tensor:
    """Call a kernel with a layer's options; biases belong to the experts' constructor."""
    options = {k: v for k, v in layer.options.items() if not k.endswith("bias")} | options
    result: Tensor = kernel(*layer.args, **options)
    return result


def built_in(layer: Layer, experts: str = "triton") -> FusedMoEModularKernel:
    return FusedMoEModularKernel(
        MoEPrepareAndFinalizeNoEP(), EXPERTS[experts](w1_bias=layer.w1_bias, w2_bias=layer.w2_bias)
    )


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", CASES)
def test_built_in_parts(case: str, experts: str, device: str, poison_empty: None) -> None:
    layer = make_layer(**CASES[case], device=device)
    assert_as_accurate(run(built_in(layer, experts), layer), layer)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", ["M0", "M1", "biased", "skipped-mapped", "topk1-on-input", "ungated"])
def test_built_in_parts_compiled(case: str, experts: str, device: str) -> None:
    layer = make_layer(**CASES[case], device=device)
    kernel = torch.compile(built_in(layer, experts), fullgraph=True, backend="aot_eager")
    assert_as_accurate(run(kernel, layer), layer)


def test_options_by_position(device: str) -> None:
    layer = make_layer(mapped=True, topk=1, device=device)
    layer.apply_router_weight_on_input = True
    given = layer.hidden_states.clone()
    result = built_in(layer)(
        given, *layer.args[1:], True, "silu", 10, layer.expert_map, None, None, None, None, None, None, True
    )
    assert result is given
    assert_as_accurate(result, layer)


@pytest.mark.parametrize("mapped", [False, True], ids=["local", "mapped"])
def test_global_num_experts_may_be_given(mapped: bool, device: str) -> None:
    layer = make_layer(mapped=mapped, skipped=True, topk=3, M=17, device=device)
    kernel = built_in(layer)
    given = run(kernel, layer, global_num_experts=10 if mapped else 5)
    torch.testing.assert_close(given, run(kernel, layer), rtol=0, atol=0)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", ["plain", "M0", "topk1-on-input", "strided", "skipped"])
def test_in_place(case: str, compiled: bool, experts: str, device: str) -> None:
    """Also into a non-contiguous tensor; the layer reads its input before it writes."""
    layer = make_layer(**CASES[case], device=device)
    kernel = built_in(layer, experts)
    given = layer.hidden_states.clone(memory_format=torch.preserve_format)
    function = torch.compile(kernel, fullgraph=True, backend="aot_eager") if compiled else kernel
    options = {k: v for k, v in layer.options.items() if not k.endswith("bias")}
    result = function(given, *layer.args[1:], inplace=True, **options)
    assert result.data_ptr() == given.data_ptr()
    assert_as_accurate(given, layer)


def traced_graph(function: Callable[..., Any], *args: Any) -> str:
    """The graph that a backend compiles, a call a line: the op and its arguments that are no tensors."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    lines: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                constants = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, bool | str)]
                lines.append(" ".join([str(node.target), *map(repr, constants)]))
        return make_boxed_func(graph.forward)

    torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record))(*args)
    return "\n".join(lines)


def test_graph_of_built_in_parts() -> None:
    """No buffers, no copies, no filling of skipped slots, and the activation in GEMM 1's epilogue."""
    layer = make_layer(skipped=True, topk=3)
    silu = "'concatenated; t0 = sigmoid(gate); t1 = mul(gate, t0); t2 = mul(t1, up); return t2'"
    assert traced_graph(built_in(layer), *layer.args).splitlines() == [
        "compile_moe.sort_tokens.default",
        "<built-in function getitem>",
        "<built-in function getitem>",
        f"compile_moe.gather_gemm.default {silu}",
        "compile_moe.scatter_gemm.default",
        "compile_moe.weight_and_reduce.default",
    ]


@pytest.mark.parametrize("experts", ["triton", "torch"])
def test_autocast(experts: str, device: str) -> None:
    """The built-in parts as torch's GEMMs: eager, compiled and fake."""
    layer = make_layer(device=device, biased=True)
    kernel = built_in(layer, experts)
    with torch.autocast(device, torch.bfloat16):
        eager = kernel(*layer.args)
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")(*layer.args)
    assert eager.dtype is compiled.dtype is torch.bfloat16
    low = layer.to(torch.bfloat16)
    assert_as_accurate(eager, low)
    assert_as_accurate(compiled, low)


class Model(nn.Module):
    """A user's module that keeps its weights, one kernel a layer, and calls it as part of its forward."""

    def __init__(self, layer: Layer, num_layers: int = 1) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(layer.w1), nn.Parameter(layer.w2)
        self.kernels = nn.ModuleList(built_in(layer) for _ in range(num_layers))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        for kernel in self.kernels:
            x = x + kernel(x, self.w1, self.w2, weights, ids)
        return x


@torch.no_grad()
def test_inside_a_compiled_module(device: str) -> None:
    layer = make_layer(device=device, biased=True)
    model = Model(layer, num_layers=2)
    x, _, _, weights, ids = layer.args
    compiled = torch.compile(model, fullgraph=True)
    first = layer.hidden_states
    torch.testing.assert_close(compiled(x, weights, ids), model(x, weights, ids), rtol=1e-4, atol=1e-4)
    single = torch.compile(Model(layer), fullgraph=True)(x, weights, ids) - first
    torch.testing.assert_close(single, layer.reference(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_compiled_one_by_one_share_one_compile(device: str) -> None:
    """Regional compilation: twelve layers of the same shape are more than dynamo's limit of recompiles."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    for _ in range(12):
        layer = make_layer(device=device, biased=True)
        compiled = torch.compile(Model(layer), fullgraph=True, backend=counter)
        x, _, _, weights, ids = layer.args
        torch.testing.assert_close(compiled(x, weights, ids) - x, layer.reference(), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("which", ["prepare_finalize", "fused_experts"])
def test_parts_of_another_kind_are_refused(which: str) -> None:
    parts: dict[str, Any] = {
        "prepare_finalize": MoEPrepareAndFinalizeNoEP(),
        "fused_experts": TritonExperts(),
    }
    parts[which] = compile_moe.fused_experts
    with pytest.raises(TypeError, match=f"{which} must be a FusedMoE.*, got function"):
        FusedMoEModularKernel(**parts)
