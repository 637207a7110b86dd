"""The layer inside torch.compile: one graph, few compiles, autocast, grad mode."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import compile_moe
from tests.support.devices import on_each_device
from tests.support.oracle import CASES, assert_as_accurate, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """RMSNorm, router, experts, residual: what a model has around the layer."""

    def __init__(self, K: int = 32, I: int = 24, E: int = 6, topk: int = 2) -> None:
        super().__init__()
        self.topk = topk
        self.norm = nn.RMSNorm(K)
        self.router = nn.Linear(K, E, bias=False)
        self.w1 = nn.Parameter(torch.randn(E, 2 * I, K) * K**-0.5)
        self.w2 = nn.Parameter(torch.randn(E, K, I) * I**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        topk_weights, topk_ids = self.router(h).softmax(-1, dtype=torch.float32).topk(self.topk)
        return x + compile_moe.fused_experts(h, self.w1, self.w2, topk_weights, topk_ids)


@pytest.mark.parametrize("case", CASES)
def test_function(case: str, device: str) -> None:
    layer = make_layer(**CASES[case], device=device)
    compiled = torch.compile(
        lambda *args: compile_moe.fused_experts(*args, **layer.options), fullgraph=True, backend="aot_eager"
    )
    assert_as_accurate(compiled(*layer.args), layer)


THROUGH_INDUCTOR = ("plain", "M1", "odd", "transposed-biased-swigluoai", "skipped-mapped")


@on_each_device(
    "dtype,case",
    itertools.product([torch.float32, torch.bfloat16], THROUGH_INDUCTOR),
    on_cpu=[
        *itertools.product([torch.float32], THROUGH_INDUCTOR),
        *itertools.product([torch.bfloat16], ["odd", "skipped-mapped"]),
    ],
)
def test_function_through_inductor(case: str, dtype: torch.dtype, device: str) -> None:
    layer = make_layer(**CASES[case], dtype=dtype, device=device)
    compiled = torch.compile(lambda *args: compile_moe.fused_experts(*args, **layer.options), fullgraph=True)
    assert_as_accurate(compiled(*layer.args), layer)


def count_compiles(
    function: Callable[..., Any], calls: list[tuple[Tensor, ...]], **options: Any
) -> tuple[int, list[Any]]:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, backend=counter, fullgraph=True, **options)
    with torch.no_grad():
        results = [compiled(*arguments) for arguments in calls]
    return counter.frame_count, results


@pytest.mark.parametrize("what", ["function", "module"])
def test_one_compile_for_all_token_counts(what: str, device: str) -> None:
    if what == "module":
        block: Callable[..., Any] = Block().to(device)
        calls = [(torch.randn(m, 32, device=device),) for m in (7, 2, 3, 16, 333, 4096)]
    else:
        layer = make_layer(device=device)
        block = compile_moe.fused_experts
        calls = [
            (x.hidden_states, layer.w1, layer.w2, x.topk_weights, x.topk_ids)
            for x in (make_layer(M=m, device=device) for m in (7, 2, 3, 16, 333, 4096))
        ]
    for index in (0,) if what == "module" else (0, 3, 4):
        torch._dynamo.mark_dynamic(calls[0][index], 0)
    compiles, results = count_compiles(block, calls)
    assert compiles == 1
    for arguments, result in zip(calls, results, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(result, block(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["function", "module"])
def test_one_compile_for_unbacked_token_counts(what: str, device: str) -> None:
    if what == "module":
        block: Callable[..., Any] = Block().to(device)
        # Inductor of torch 2.11 divides by zero in the grid of the norm's kernel where there are no tokens.
        divides = device == "cuda" and torch.torch_version.TorchVersion(torch.__version__) < "2.13"
        counts = (5, 1, 2, 600) if divides else (5, 1, 0, 2, 600)
        calls = [(torch.randn(m, 32, device=device),) for m in counts]
        marked = (0,)
    else:
        layer = make_layer(device=device)
        block = compile_moe.fused_experts
        calls = [
            (x.hidden_states, layer.w1, layer.w2, x.topk_weights, x.topk_ids)
            for x in (make_layer(M=m, device=device) for m in (5, 1, 0, 2, 600))
        ]
        marked = (0, 3, 4)
    for index in marked:
        torch._dynamo.decorators.mark_unbacked(calls[0][index], 0)
    compiles, results = count_compiles(block, calls)
    assert compiles == 1
    for arguments, result in zip(calls, results, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(result, block(*arguments), rtol=1e-4, atol=1e-4)


def test_automatic_dynamic_compiles_at_most_three_times(device: str) -> None:
    calls = [(torch.randn(m, 32, device=device),) for m in (7, 2, 3, 1, 16, 333)]
    compiles, _ = count_compiles(Block().to(device), calls)
    assert compiles <= 3


ACTIVATIONS: dict[str, Any] = {
    "named": "silu",
    "fused": lambda gate_up: F.silu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1],
    "unfused": lambda gate_up: F.silu(gate_up.chunk(2, -1)[0]).flip(0).flip(0) * gate_up.chunk(2, -1)[1],
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dynamic", [True, False, None])
def test_dynamic_settings(dynamic: bool | None, activation: str, backend: str, device: str) -> None:
    """The weights are arguments: dynamic=True makes all of their sizes dynamic."""
    if backend == "inductor" and (device, dynamic) == ("cpu", False):
        pytest.skip("what other tests compile")
    layer = make_layer(device=device)
    compiled = torch.compile(compile_moe.fused_experts, fullgraph=True, dynamic=dynamic, backend=backend)
    assert_as_accurate(compiled(*layer.args, activation=ACTIVATIONS[activation]), layer)


@pytest.mark.parametrize("dynamic", [True, False])
def test_activation_of_a_wrong_width(dynamic: bool, device: str) -> None:
    layer = make_layer(device=device)
    compiled = torch.compile(compile_moe.fused_experts, dynamic=dynamic, backend="eager")
    for function in (compile_moe.fused_experts, compiled):
        with pytest.raises(ValueError, match=r"activation must return \(S, I\) = .*, got \(\d+, 3\)"):
            function(*layer.args, activation=lambda gate_up: gate_up[:, :3].cumsum(-1))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_as_torch_does(autocast_dtype: torch.dtype, device: str) -> None:
    """float32 arguments: GEMMs run in the autocast dtype, eager, compiled and fake."""
    layer = make_layer(device=device, biased=True)

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        return compile_moe.fused_experts(*args, **layer.options), args[0] @ args[1][0].t()

    with torch.autocast(device, autocast_dtype):
        eager, gemm = function(*layer.args)
        # Not through inductor: torch 2.11's cache of compiled graphs ignores the autocast dtype, for torch.mm as well.
        compiled, _ = torch.compile(function, fullgraph=True, backend="aot_eager")(*layer.args)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake, _ = function(*(mode.from_tensor(a) for a in layer.args))
    assert eager.dtype is compiled.dtype is fake.dtype is gemm.dtype is autocast_dtype
    low = layer.to(autocast_dtype)
    assert_as_accurate(eager, low)
    assert_as_accurate(compiled, low)


def test_autocast_leaves_float64_alone() -> None:
    layer = make_layer(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert compile_moe.fused_experts(*layer.args).dtype is torch.float64


def test_grad_mode_fails_with_the_way_out(device: str) -> None:
    block = Block().to(device)
    x = torch.randn(4, 32, device=device)
    with pytest.raises(NotImplementedError, match=r"compile_moe::\w+ has no backward .*torch\.no_grad\(\)"):
        block(x).sum().backward()
    with pytest.raises(Exception, match=r"compile_moe::\w+ has no backward .*torch\.no_grad\(\)"):
        torch.compile(block, fullgraph=True)(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


def test_in_place(device: str) -> None:
    layer = make_layer(device=device)

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        y = compile_moe.fused_experts(x, *rest, inplace=True)
        return y, x * 2

    x, *rest = layer.args
    given = x.clone()
    y, doubled = torch.compile(function, fullgraph=True)(given, *rest)
    assert_as_accurate(given, layer)
    torch.testing.assert_close(doubled, given * 2)
    torch.testing.assert_close(y, given)


def test_a_captured_scalar_is_part_of_the_graph(device: str) -> None:
    """Two compiled functions with equal code and different constants don't share an epilogue."""
    layer = make_layer(device=device)

    def make(limit: float) -> Callable[[Tensor], Tensor]:
        def activation(gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, -1)
            return gate.clamp(max=limit) * up

        return activation

    for limit in (0.1, 0.7):
        layer.activation = layer.function = make(limit)
        compiled = torch.compile(
            lambda *a, act=layer.activation: compile_moe.fused_experts(*a, activation=act)
        )
        assert_as_accurate(compiled(*layer.args), layer)
        assert_as_accurate(compile_moe.fused_experts(*layer.args, activation=layer.activation), layer)


def test_a_changed_attribute_changes_the_epilogue(device: str) -> None:
    """Eager and compiled: what a bound method reads from its module is never stale."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.limit = 0.1

        def gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, -1)
            return gate.clamp(max=self.limit) * up

        def forward(self, *args: Tensor) -> Tensor:
            return compile_moe.fused_experts(*args, activation=self.gate)

    module = Experts()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    layer = make_layer(device=device, function=module.gate)
    for limit in (0.1, 0.7):
        module.limit = limit
        assert_as_accurate(module(*layer.args), layer)
        assert_as_accurate(compiled(*layer.args), layer)


def silu_times(gate_up: Tensor, factor: float = 1.0) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return nn.functional.silu(gate) * up * factor


class CallableModule(nn.Module):
    def forward(self, gate_up: Tensor) -> Tensor:
        return silu_times(gate_up)


class CallableObject:
    def __call__(self, gate_up: Tensor) -> Tensor:
        return silu_times(gate_up)


callable_forms: dict[str, Callable[[Tensor], Tensor]] = {
    "function": silu_times,
    "lambda": lambda gate_up: silu_times(gate_up),
    "partial": functools.partial(silu_times, factor=1.0),
    "module": CallableModule(),
    "method": CallableModule().forward,
    "object": CallableObject(),
}


@pytest.mark.parametrize("form", callable_forms)
def test_every_form_of_callable_is_fused(form: str, device: str) -> None:
    layer = make_layer(device=device)
    activation = callable_forms[form]
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda *args: compile_moe.fused_experts(*args, activation=activation), fullgraph=True, backend=backend
    )
    assert_as_accurate(compiled(*layer.args), layer)
    assert_as_accurate(compile_moe.fused_experts(*layer.args, activation=activation), layer)
    assert any(node.target is torch.ops.compile_moe.fused_moe.default for node in graphs[0].graph.nodes)


def test_a_function_defined_inside_the_graph(device: str) -> None:
    layer = make_layer(device=device)

    def function(*args: Tensor) -> Tensor:
        factor = 1.0
        return compile_moe.fused_experts(*args, activation=lambda gate_up: silu_times(gate_up, factor))

    assert_as_accurate(torch.compile(function, fullgraph=True, backend="aot_eager")(*layer.args), layer)


def test_dynamo_does_not_trace_into_the_ops(device: str) -> None:
    """Where a graph breaks, ops run as they are: on a GPU dynamo would end in Triton's launcher."""
    layer = make_layer(device=device)
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter)
    def function(*args: Tensor) -> Tensor:
        # A break inside of a loop: dynamo leaves the whole frame, and goes on with what it calls.
        for _ in range(2):
            torch._dynamo.graph_break()
            result = torch.ops.compile_moe.fused_moe(*args)
        torch.ops.compile_moe.fused_moe_(args[0].clone(), *args[1:])
        with torch.autocast(device, torch.bfloat16):
            torch.ops.compile_moe.fused_moe(*args)
        return result

    assert_as_accurate(function(*layer.args), layer)
    assert counter.frame_count == 0, counter.graphs
