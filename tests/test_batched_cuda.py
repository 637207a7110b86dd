"""The batched format on a GPU: captured and replayed with other counts, without a sync, quantized, large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from compile_moe import BatchedTritonExperts, FusedMoEModularKernel
from compile_moe.ops import batch_tokens, gather_gemm, reduce_batch, scatter_gemm, sort_batch, sort_tokens
from compile_moe.ops.kernels.heuristic_tiles import WARP_SPECIALIZED_PAYS_FROM
from compile_moe.ops.named_activations import program_text
from compile_moe.ops.sort_batch import sort_batch_torch
from tests.support.batched import PoisonedParts, batched_kernel, holds_token, kept, poison, poisoning
from tests.support.oracle import Layer, assert_as_accurate, make_layer
from tests.support.profiled import profiled
from tests.support.quantized import Quantized, make_quantized
from tests.support.quantized import assert_as_accurate as assert_quantized_as_accurate
from tests.support.quantized_gemms import DEFAULTS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "no_grad")]

SHAPE: dict[str, Any] = {"K": 128, "I": 64, "E": 8, "topk": 2, "dtype": torch.bfloat16, "device": "cuda"}
ROUTINGS: tuple[dict[str, Any], ...] = ({}, {"routing": "one"}, {"routing": "empty"}, {"skipped": True})


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


#: NaN in rows without a token: what isn't written would be whatever the allocator last held.
POISONING = poisoning(BatchedTritonExperts)


def same_weights(layer: Layer, m: int, **routing: Any) -> Layer:
    other = make_layer(M=m, **SHAPE, **routing)
    other.w1, other.w2 = layer.w1, layer.w2
    return other


def check(out: Tensor, kernel: FusedMoEModularKernel, layer: Layer, max_num_tokens: int) -> None:
    remaining = kept(layer, max_num_tokens)
    assert_as_accurate(out, remaining.layer)
    assert kernel.prepare_finalize.num_dropped.tolist() == remaining.num_dropped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("max_num_tokens", [1, 16, 64, 300])
@pytest.mark.parametrize("m", [0, 1, 17, 300])
def test_layer(m: int, max_num_tokens: int, dtype: torch.dtype) -> None:
    for routing in ROUTINGS:
        layer = make_layer(M=m, **(SHAPE | {"dtype": dtype}), biased=True, **routing)
        kernel = batched_kernel(layer, max_num_tokens, POISONING, parts=PoisonedParts)
        for _ in range(2):  # the second time from memory
            check(kernel(*layer.args), kernel, layer, max_num_tokens)


@pytest.mark.parametrize("max_num_tokens", [3, 64, 200])
@pytest.mark.parametrize("m", [1, 64, 700])
def test_capture_replays_with_other_counts(m: int, max_num_tokens: int) -> None:
    layer = make_layer(M=m, **SHAPE)
    kernel = batched_kernel(layer, max_num_tokens)
    kernel(*layer.args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(*layer.args)
    for routing in ROUTINGS * 2:
        other = same_weights(layer, m, **routing)
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            getattr(layer, name).copy_(getattr(other, name))
        out.fill_(torch.nan)
        graph.replay()
        check(out, kernel, other, max_num_tokens)


def test_experts_alone_replay_with_other_counts() -> None:
    """From no token to more than there is room for; rows without tokens stay as they are."""
    layer = make_layer(M=2, **SHAPE, biased=True)
    batch = torch.randn(8, 40, 128, device="cuda").bfloat16()
    counts = torch.zeros(8, dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        order = sort_batch(counts, 40)
        rows = gather_gemm(batch.flatten(0, 1), layer.w1, *order, 1, layer.w1_bias, program_text("silu"))
        return scatter_gemm(rows, layer.w2, *order, 320, 1, layer.w2_bias).view(8, 40, 128)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for given in ([0] * 8, [40] * 8, [99, 0, 1, 40, 3, -1, 17, 0], [0] * 7 + [40]):
        counts.copy_(torch.tensor(given))
        fresh = torch.randn(batch.shape, device="cuda").bfloat16()
        batch.copy_(poison(fresh, counts))
        out.fill_(7)
        graph.replay()
        mask = holds_token(counts, 40)
        assert (out[~mask] == 7).all(), "a row without a token was written"
        expert, row = torch.where(mask)
        if len(expert):
            tokens = Layer(
                batch[expert, row],
                layer.w1,
                layer.w2,
                torch.ones(len(expert), 1, device="cuda"),
                expert.unsqueeze(1),
                w1_bias=layer.w1_bias,
                w2_bias=layer.w2_bias,
            )
            assert_as_accurate(out[expert, row], tokens)


def test_nothing_synchronizes() -> None:
    layer = make_layer(M=64, **SHAPE, mapped=True)
    kernel = batched_kernel(layer, 16)
    kernel(*layer.args, expert_map=layer.expert_map)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(*layer.args, expert_map=layer.expert_map)
        total = torch.zeros((), dtype=torch.int64, device="cuda")
        total += kernel.prepare_finalize.num_dropped.sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.item() == sum(kept(layer, 16).num_dropped)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=str)
def test_compiled(mode: str | None) -> None:
    first = make_layer(M=64, **SHAPE)
    kernel = batched_kernel(first, 24, POISONING, parts=PoisonedParts)
    compiled = torch.compile(kernel, fullgraph=True, dynamic=True, mode=mode)
    counters.clear()
    for m in (64, 16, 300):
        for routing in ROUTINGS:
            layer = same_weights(first, m, **routing)
            torch.compiler.cudagraph_mark_step_begin()
            check(compiled(*layer.args).clone(), kernel, layer, 24)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_reduce_overhead_launches_graphs() -> None:
    layer = make_layer(M=64, **SHAPE)
    compiled = torch.compile(batched_kernel(layer, 24), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        compiled(*layer.args)
    torch.compiler.cudagraph_mark_step_begin()
    names = {event.name for event in profiled(lambda: compiled(*layer.args))}
    assert any("cudaGraphLaunch" in name for name in names), sorted(names)


def test_many_rows_run_warp_specialized() -> None:
    """Where they run for tokens (Hopper), with experts of no row, of some, and of all."""
    layer = make_layer(M=600, **SHAPE, biased=True, routing="empty")
    most_rows = 2 * max(WARP_SPECIALIZED_PAYS_FROM.values())
    kernel = batched_kernel(layer, most_rows, POISONING, parts=PoisonedParts)
    check(kernel(*layer.args), kernel, layer, most_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_ops_against_their_pytorch(dtype: torch.dtype) -> None:
    layer = make_layer(M=70, **SHAPE, mapped=True, skipped=True)
    tokens = (layer.hidden_states * 20).to(dtype)
    order = sort_tokens(layer.topk_ids, 8, layer.expert_map)
    batch, *rest = batch_tokens(tokens, *order, 2, 5)
    expected, *others = batch_tokens(tokens.cpu(), *(t.cpu() for t in order), 2, 5)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(rest, others, strict=True))
    mask = holds_token(others[1], 5)
    assert torch.equal(batch.cpu().view(torch.uint8)[mask], expected.view(torch.uint8)[mask])
    for result, plain in zip(sort_batch(rest[1], 5), sort_batch_torch(rest[1], 5), strict=True):
        assert torch.equal(result, plain)
    if dtype in (torch.bfloat16, torch.float32):
        given = poison(batch, rest[1]), layer.topk_weights, rest[0]
        torch.testing.assert_close(reduce_batch(*given).cpu(), reduce_batch(*(t.cpu() for t in given)))


def test_more_elements_than_32_bits_count() -> None:
    """A batch of 2^31 + elements; its last expert's rows are right."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    e, rows, k = 9, 2**18, 1024
    tokens = torch.randn(40, k, device="cuda").bfloat16()
    slots = torch.arange(40, dtype=torch.int32, device="cuda")
    offsets = torch.tensor([0] * e + [40], dtype=torch.int32, device="cuda")
    batch, batch_rows, counts, _ = batch_tokens(tokens, slots, offsets, 1, rows)
    assert batch.numel() > 2**31 and counts.tolist() == [0] * (e - 1) + [40]
    assert torch.equal(batch[-1, :40], tokens)
    out = reduce_batch(batch, torch.ones(40, 1, device="cuda"), batch_rows)
    assert torch.equal(out, tokens)


def on_gpu(q: Quantized) -> Quantized:
    def moved(value: Any) -> Any:
        return value.cuda() if isinstance(value, Tensor) else value

    layer = Layer(**{name: moved(value) for name, value in vars(q.layer).items()})
    q1, q2 = (type(w)(*map(moved, w)) for w in (q.q1, q.q2))
    return Quantized(layer, q.variant, q1, q2, moved(q.a1_scale), moved(q.a2_scale))


@pytest.mark.parametrize("how", ["eager", "compiled", "captured"])
@pytest.mark.parametrize("variant", DEFAULTS)
def test_quantized(variant: str, how: str) -> None:
    shape: dict[str, Any] = {"K": 512, "I": 384, "E": 8, "topk": 2, "biased": True, "dtype": torch.bfloat16}
    q = make_quantized(DEFAULTS[variant], M=40, **shape)
    device = on_gpu(q)
    kernel = batched_kernel(device.layer, 9, POISONING, device.config(), PoisonedParts)
    expected = Quantized(kept(q.layer, 9).layer, *list(vars(q).values())[1:])
    if how == "captured":
        kernel(*device.args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel(*device.args)
        out.fill_(torch.nan)
        graph.replay()
    else:
        run = kernel if how == "eager" else torch.compile(kernel, fullgraph=True, dynamic=True)
        out = run(*device.args)
    assert_quantized_as_accurate(out.cpu(), expected)
