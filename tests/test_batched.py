"""Layers in the batched format: every hostile layer, capacity, poisoned rows, compiled and eager."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from compile_moe import (
    Activation,
    BatchedPrepareAndFinalize,
    BatchedTritonExperts,
    FusedMoEModularKernel,
)
from compile_moe.ops.named_activations import NAMES
from tests.support.batched import (
    EXPERTS,
    PoisonedParts,
    batched_kernel,
    holds_token,
    kept,
    options_of,
    poison,
    poisoning,
)
from tests.support.devices import on_each_device
from tests.support.oracle import ACTIVATIONS, CASES, Layer, assert_as_accurate, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def room_for_all(layer: Layer) -> int:
    return max(1, layer.topk_ids.numel())


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", CASES)
def test_layer(case: str, experts: str, device: str, poison_empty: None) -> None:
    layer = make_layer(**CASES[case], device=device)
    kernel = batched_kernel(layer, room_for_all(layer), experts)
    assert_as_accurate(kernel(*layer.args, **options_of(layer)), layer)
    assert kernel.prepare_finalize.num_dropped.tolist() == [0] * layer.w1.size(0)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, experts: str, device: str) -> None:
    layer = make_layer(M=33, biased=True, dtype=dtype, device=device)
    assert_as_accurate(batched_kernel(layer, 20, experts)(*layer.args), kept(layer, 20).layer)


@pytest.mark.parametrize("experts", EXPERTS)
def test_float64(experts: str) -> None:
    layer = make_layer(M=33, biased=True, dtype=torch.float64)
    result = batched_kernel(layer, 20, experts)(*layer.args)
    torch.testing.assert_close(result, kept(layer, 20).layer.reference(), rtol=1e-12, atol=1e-12)


#: Layers, some of whose experts get more slots than a small capacity holds.
CROWDED = ("all-on-one", "duplicates", "odd", "skipped-mapped", "biased", "strided", "M1", "M0")


@pytest.mark.parametrize("max_num_tokens", [1, 3, 8])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", CROWDED)
def test_capacity(case: str, experts: str, max_num_tokens: int, device: str, poison_empty: None) -> None:
    """Slots beyond it count nothing, are counted, and change nothing for others."""
    layer = make_layer(**CASES[case], device=device)
    remaining = kept(layer, max_num_tokens)
    kernel = batched_kernel(layer, max_num_tokens, experts)
    assert_as_accurate(kernel(*layer.args, **options_of(layer)), remaining.layer)
    assert kernel.prepare_finalize.num_dropped.tolist() == remaining.num_dropped


NOBODYS = ("biased", "skipped-mapped", "M0", "M1", "all-on-one", "ungated")


# Compiled, with all cases once.
@on_each_device(
    "case,experts,backend",
    itertools.product(NOBODYS, EXPERTS, [None, "aot_eager", "inductor"]),
    on_cpu=[
        *itertools.product(NOBODYS, EXPERTS, [None]),
        *itertools.product(["M0", "M1", "ungated"], EXPERTS, ["aot_eager"]),
        *itertools.product(["biased", "skipped-mapped", "all-on-one"], EXPERTS, ["inductor"]),
    ],
)
def test_rows_without_tokens_are_nobodys(case: str, experts: str, backend: str | None, device: str) -> None:
    """NaN in them, before the experts and behind them, reaches no result."""
    layer = make_layer(**CASES[case], device=device)
    kernel = batched_kernel(layer, 7, poisoning(EXPERTS[experts]), parts=PoisonedParts)
    function = kernel if backend is None else torch.compile(kernel, fullgraph=True, backend=backend)
    assert_as_accurate(function(*layer.args, **options_of(layer)), kept(layer, 7).layer)


COMPILED = ("plain", "M0", "M1", "biased", "skipped-mapped", "topk1-on-input")


@on_each_device(
    "case,experts,backend",
    itertools.product(COMPILED, EXPERTS, ["aot_eager", "inductor"]),
    on_cpu=[
        *itertools.product(COMPILED, EXPERTS, ["aot_eager"]),
        *itertools.product(["M0", "M1", "skipped-mapped"], EXPERTS, ["inductor"]),
    ],
)
def test_compiled(case: str, experts: str, backend: str, device: str) -> None:
    layer = make_layer(**CASES[case], device=device)
    kernel = batched_kernel(layer, 4, experts)
    compiled = torch.compile(kernel, fullgraph=True, backend=backend)
    remaining = kept(layer, 4)
    assert_as_accurate(compiled(*layer.args, **options_of(layer)), remaining.layer)
    assert kernel.prepare_finalize.num_dropped.tolist() == remaining.num_dropped


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("mark", ["dynamic", "unbacked"])
def test_one_compile_serves_all_token_counts(mark: str, experts: str, device: str) -> None:
    """The counter of each call is the call's own."""
    first = make_layer(M=9, device=device)
    kernel = batched_kernel(first, 6, experts)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(kernel, fullgraph=True, backend=counter)
    for m in (9, 40, 17, 2):
        layer = make_layer(M=m, device=device)
        layer.w1, layer.w2 = first.w1, first.w2
        for t in (layer.hidden_states, layer.topk_weights, layer.topk_ids):
            if mark == "dynamic":
                torch._dynamo.mark_dynamic(t, 0)
            else:
                torch._dynamo.decorators.mark_unbacked(t, 0)
        remaining = kept(layer, 6)
        assert_as_accurate(compiled(*layer.args), remaining.layer)
        assert kernel.prepare_finalize.num_dropped.tolist() == remaining.num_dropped
    assert counter.frame_count == 1


class TwoLayers(torch.nn.Module):
    """The counter in the graph that makes it: no sync, and no second kernel instance is touched."""

    def __init__(self, layer: Layer, max_num_tokens: int) -> None:
        super().__init__()
        self.kernels = torch.nn.ModuleList(batched_kernel(layer, max_num_tokens) for _ in range(2))

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        x, *rest = args
        total = torch.zeros((), dtype=torch.int64, device=x.device)
        for kernel in self.kernels:
            x = x + kernel(x, *rest)
            total = total + kernel.prepare_finalize.num_dropped.sum()
        return x, total


@pytest.mark.parametrize("backend", [None, "inductor"], ids=str)
def test_the_counter_is_read_inside_the_graph(backend: str | None, device: str) -> None:
    layer = make_layer(M=40, device=device)
    model = TwoLayers(layer, 5)
    function = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    _, total = function(*layer.args)
    assert total.item() == 2 * sum(kept(layer, 5).num_dropped) > 0


def test_layers_compiled_one_by_one_share_one_compile() -> None:
    counter = CompileCounterWithBackend("eager")
    for _ in range(12):
        layer = make_layer()
        compiled = torch.compile(batched_kernel(layer, 9), fullgraph=True, backend=counter)
        assert_as_accurate(compiled(*layer.args), layer)
    assert counter.frame_count == 1


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", NAMES)
def test_named_activations(name: str, experts: str, device: str) -> None:
    layer = make_layer(M=17, biased=True, activation=name, device=device)
    assert_as_accurate(
        batched_kernel(layer, 9, experts)(*layer.args, **options_of(layer)), kept(layer, 9).layer
    )


def row_softmax(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.softmax(-1) * up + 1


def clamped(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate.clamp(max=1)) * (up + 1)


def uninterleaved_swigluoai(gate_up: Tensor) -> Tensor:
    interleaved = torch.stack(gate_up.chunk(2, -1), -1).flatten(-2)
    return ACTIVATIONS["swigluoai"](interleaved)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=str)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        pytest.param(row_softmax, row_softmax, id="row-wise"),
        pytest.param(clamped, clamped, id="pointwise"),
        pytest.param(
            Activation("swigluoai", interleaved=False), uninterleaved_swigluoai, id="with-parameters"
        ),
    ],
)
def test_other_activations(
    activation: Any, function: Any, experts: str, backend: str | None, device: str
) -> None:
    layer = make_layer(M=17, biased=True, activation=activation, function=function, device=device)
    kernel = batched_kernel(layer, 5, experts, parts=PoisonedParts)
    run = kernel if backend is None else torch.compile(kernel, fullgraph=True, backend=backend)
    assert_as_accurate(run(*layer.args, activation=activation), kept(layer, 5).layer)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=str)
def test_in_place(backend: str | None, device: str) -> None:
    layer = make_layer(strided=True, device=device)
    kernel = batched_kernel(layer, 18)
    run = kernel if backend is None else torch.compile(kernel, fullgraph=True, backend=backend)
    given = layer.hidden_states.clone(memory_format=torch.preserve_format)
    result = run(given, *layer.args[1:], inplace=True)
    assert result.data_ptr() == given.data_ptr()
    assert_as_accurate(given, layer)


@pytest.mark.parametrize("experts", EXPERTS)
def test_autocast(experts: str, device: str) -> None:
    layer = make_layer(biased=True, device=device)
    kernel = batched_kernel(layer, 18, experts)
    with torch.autocast(device, torch.bfloat16):
        eager = kernel(*layer.args)
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")(*layer.args)
    low = layer.to(torch.bfloat16)
    assert_as_accurate(eager, low)
    assert_as_accurate(compiled, low)


def apply(experts: Any, batch: Tensor, layer: Layer, counts: Tensor, **options: Any) -> Tensor:
    """The published ``apply`` with everything that isn't there."""
    given: dict[str, Any] = dict.fromkeys(
        ("expert_map", "w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1q_scale", "a2_scale")
    )
    given |= {"activation": layer.activation, "global_num_experts": -1} | options
    empty = batch.new_empty(0, dtype=layer.hidden_states.dtype)
    result: Tensor = experts.apply(
        batch,
        layer.w1,
        layer.w2,
        layer.topk_ids,
        workspace13=empty,
        workspace2=empty,
        expert_num_tokens=counts,
        **given,
    )
    return result


#: Tokens of each of three experts, of at most six.
COUNTS = {
    "none": [0, 0, 0],
    "one-empty": [4, 0, 6],
    "full": [6, 6, 6],
    "all-on-one": [0, 6, 0],
    "over-capacity": [7, 2**31 - 1, -5],
}


@pytest.mark.parametrize("strides", ["contiguous", "rows-apart", "experts-last"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", COUNTS)
def test_apply(case: str, experts: str, dtype: torch.dtype, strides: str, device: str) -> None:
    """Of a batch that somebody else made."""
    layer = make_layer(E=3, M=2, biased=True, device=device)
    counts = torch.tensor(COUNTS[case], device=device).to(dtype)
    batch = poison(torch.randn(3, 6, 48, device=device), counts)
    if strides == "rows-apart":
        batch = torch.stack([batch, batch], 2)[:, :, 0]
    elif strides == "experts-last":
        batch = batch.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    made = EXPERTS[experts](6, layer.w1_bias, layer.w2_bias)
    out = apply(made, batch, layer, counts)
    assert out.shape == (3, 6, 48) and out.is_contiguous()
    for e, count in enumerate(counts.clamp(0, 6).tolist()):
        one = Layer(
            batch[e, :count],
            layer.w1[e : e + 1],
            layer.w2[e : e + 1],
            torch.ones(count, 1, device=device),
            torch.zeros(count, 1, dtype=torch.int64, device=device),
            w1_bias=layer.w1_bias[e : e + 1],
            w2_bias=layer.w2_bias[e : e + 1],
        )
        assert_as_accurate(out[e, :count], one, factor=4)


def test_a_batch_is_prepared_as_published(device: str) -> None:
    layer = make_layer(M=23, topk=3, E=7, mapped=True, skipped=True, device=device)
    x, _, _, weights, ids = layer.args
    parts = BatchedPrepareAndFinalize(5, 7)
    batch, scale, counts, *dispatched = parts.prepare(
        x, None, None, weights, ids, 14, layer.expert_map, False
    )
    remaining = kept(layer, 5)
    assert batch.shape == (7, 5, 48) and batch.is_contiguous() and scale is None
    assert counts.dtype is torch.int32 and counts.tolist() == remaining.num_tokens
    assert dispatched == [None, None], "ids and weights are the layer's"
    local = torch.full_like(ids, -1)
    known = (remaining.layer.topk_ids >= 0) & (remaining.layer.topk_ids < 14)
    local[known] = layer.expert_map[remaining.layer.topk_ids[known]]
    for e in range(7):
        tokens = torch.where(local == e)[0]
        assert torch.equal(batch[e][holds_token(counts, 5)[e]], x[tokens])


def test_experts_workspaces() -> None:
    sizes = BatchedTritonExperts(6).workspace_shapes(torch.empty(9, 48), 9, 80, 48, 2, 5)
    assert sizes == (5 * 6 * 80, 5 * 6 * 80, torch.float32)


def test_one_instance_serves_layers_one_after_another(device: str) -> None:
    parts, experts = BatchedPrepareAndFinalize(30), BatchedTritonExperts(30)
    kernels = [FusedMoEModularKernel(parts, experts) for _ in range(2)]
    for m in (5, 9, 5):
        for kernel in kernels:
            layer = make_layer(M=m, device=device)
            assert_as_accurate(kernel(*layer.args), layer)
