"""The all-to-all with a static capacity in one process: kernels, export, errors. Results: test_expert_parallel.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from compile_moe import (
    BatchedAllToAllPrepareAndFinalize,
    BatchedPrepareAndFinalize,
    BatchedTritonExperts,
    ExpertPlacement,
    FusedMoEModularKernel,
    TritonExperts,
)
from tests.support.batched import holds_token, kept
from tests.support.fake_cuda import cuda_empty, generated_kernels
from tests.support.oracle import assert_as_accurate, make_layer

E, K, I = 8, 2048, 768
HALVES = ExpertPlacement.linear(E, 2)


@pytest.fixture
def fake_group() -> Iterator[None]:
    """Two ranks, the other of which isn't there: collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with torch.no_grad():
        yield
    dist.destroy_process_group()


def test_kernels_of_a_layer(fake_group: None, fresh_dynamo: None) -> None:
    """Behind the collective that brings results back, finalize, residual and norm are one kernel."""
    made: list[Any] = []

    def layer(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, norm: Tensor) -> Any:
        kernel, expert_map = made
        h = x + kernel(x, w1, w2, weights, ids, expert_map=expert_map)
        return h, F.rms_norm(h, (K,), norm, 1e-6), kernel.prepare_finalize.num_dropped

    def make() -> list[Tensor]:
        parts = BatchedAllToAllPrepareAndFinalize(HALVES, 16, device="cuda")
        made[:] = FusedMoEModularKernel(parts, BatchedTritonExperts(32)), parts.expert_map
        weights = cuda_empty(E // 2, 2 * I, K), cuda_empty(E // 2, K, I)
        routing = cuda_empty(16, 8, dtype=torch.float32), cuda_empty(16, 8, dtype=torch.int64)
        return [cuda_empty(16, K), *weights, *routing, cuda_empty(K)]

    # Folding would compute constants, which takes a device.
    generated = generated_kernels(layer, make, [(0, 0), (3, 0), (4, 0)], joint_graph_constant_folding=False)
    assert generated.op_calls == [
        *("sort_tokens", "batch_tokens"),
        *("sort_tokens", "batch_tokens"),
        *("sort_batch", "gather_gemm", "scatter_gemm"),
    ]
    collectives = [call for call in generated.extern_calls if "_c10d_functional.all_to_all" in call]
    assert len(collectives) == 3, "tokens; counts; results"
    # The received rows' experts; results of rows to send; finalize, residual and norm; the counter.
    assert len(generated.triton_kernels) == 4, generated.triton_kernels
    # Kernels are named by their ops, among which torch has the norm whole or in parts.
    last = [name for name in generated.triton_kernels if "rsqrt" in name or "rms_norm" in name]
    assert len(last) == 1 and "reduce_batch" in last[0]


class Block(nn.Module):
    """A layer whose counter is a result."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = BatchedAllToAllPrepareAndFinalize(ExpertPlacement.linear(5, 1), 4)
        self.kernel = FusedMoEModularKernel(self.parts, BatchedTritonExperts(self.parts.max_num_tokens))

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.kernel(*args, expert_map=self.parts.expert_map), self.parts.num_dropped


def test_export(group_of_one: None) -> None:
    """One program for all numbers of tokens; tracing leaves nothing in the object."""
    block, layer = Block(), make_layer()
    m = torch.export.Dim("M", min=2, max=4096)
    sizes = {"args": ({0: m}, None, None, {0: m}, {0: m})}
    program = torch.export.export(block, layer.args, dynamic_shapes=sizes)
    assert copy.deepcopy(block).parts.num_dropped is None
    for num_tokens in (2, 9, 300):
        given = make_layer(M=num_tokens).args
        for result, expected in zip(program.module()(*given), block(*given), strict=True):
            torch.testing.assert_close(result, expected)


def prepared(parts: BatchedAllToAllPrepareAndFinalize, layer: Any) -> Tensor:
    x, _, _, weights, ids = layer.args
    num_experts = parts.num_experts
    return parts.prepare(x, None, None, weights, ids, num_experts, parts.expert_map, False)[0]


def test_prepare_batches_as_one_rank_does(group_of_one: None) -> None:
    layer = make_layer(M=23, topk=3, skipped=True)
    parts = BatchedAllToAllPrepareAndFinalize(ExpertPlacement.linear(5, 1), 7)
    x, _, _, weights, ids = layer.args
    arguments = x, None, None, weights, ids, 5, parts.expert_map, False
    batch, _, counts, *dispatched = parts.prepare(*arguments)
    expected_batch, _, expected_counts, *_ = BatchedPrepareAndFinalize(7, 5).prepare(*arguments)
    assert counts is not None and counts.dtype is torch.int32 and torch.equal(counts, expected_counts)
    mask = holds_token(counts, 7)
    assert torch.equal(batch[mask], expected_batch[mask])
    assert dispatched == [None, None], "ids and weights are the layer's"


def test_autocast(group_of_one: None) -> None:
    block, layer = Block(), make_layer(M=4)
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = block(*layer.args)
    assert_as_accurate(result, layer.to(torch.bfloat16))


def test_finalize_is_for_what_was_prepared(group_of_one: None) -> None:
    parts, layer = BatchedAllToAllPrepareAndFinalize(ExpertPlacement.linear(5, 1), 18), make_layer()
    options = layer.topk_weights, None, None, -1, False
    batch = prepared(parts, layer)
    with pytest.raises(ValueError, match=r"fused_expert_output must be .* = \(5, 18\), got \(5, 17, 48\)"):
        parts.reduce(batch[:, 1:], *options)
    batch = prepared(parts, layer)
    with pytest.raises(ValueError, match="a1 must be"):
        parts.prepare(batch, None, None, layer.topk_weights, layer.topk_ids, 5, parts.expert_map, False)
    with pytest.raises(RuntimeError, match="finalize without a prepare before it"):
        parts.reduce(batch, *options)


def test_experts_of_another_size(group_of_one: None) -> None:
    parts, layer = BatchedAllToAllPrepareAndFinalize(ExpertPlacement.linear(5, 1), 18), make_layer()
    kernel = FusedMoEModularKernel(parts, BatchedTritonExperts(9))
    with pytest.raises(
        ValueError, match=r"with max_num_tokens = 9, .*got \(5, 18, 48\); .*=prepare_finalize.max_num_tokens"
    ):
        kernel(*layer.args, expert_map=parts.expert_map)
    kernel = FusedMoEModularKernel(parts, TritonExperts())
    with pytest.raises(ValueError, match=r"takes tokens \(M, K\) .*BatchedTritonExperts"):
        kernel(*layer.args, expert_map=parts.expert_map)


# fmt: off
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "zero": (0, ValueError, "max_tokens_per_rank must be at least 1, got 0"),
    "float": (1.5, TypeError, "max_tokens_per_rank must be an int, got float"),
    "too-large": (2**28, ValueError, "4 experts for 268435456 slots of each of 2 ranks; lower max_tokens_per_rank"),
}
# fmt: on


@pytest.mark.parametrize("case", WRONG)
def test_wrong_capacities(case: str, fake_group: None) -> None:
    given, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        BatchedAllToAllPrepareAndFinalize(HALVES, given)


@pytest.mark.parametrize("placement", [HALVES, HALVES.with_copies({0: [1]})], ids=["once", "replicated"])
def test_ids_beyond_the_last(placement: ExpertPlacement, fake_group: None) -> None:
    layer = make_layer(E=E)
    layer.topk_ids[3, 1] = 100
    parts = BatchedAllToAllPrepareAndFinalize(placement, 9)
    with pytest.raises(ValueError, match=r"topk_ids must be below the number of experts, 8 .*, got 100"):
        prepared(parts, layer)


def test_what_all_parts_over_a_group_check(fake_group: None) -> None:
    layer, parts = make_layer(E=E // 2), BatchedAllToAllPrepareAndFinalize(HALVES, 9)
    kernel = FusedMoEModularKernel(parts, BatchedTritonExperts(18))
    with pytest.raises(ValueError, match="global_num_experts must be that of the placement, 8, got 4"):
        kernel(*layer.args)
    with pytest.raises(ValueError, match="expert_map is missing"):
        kernel(*layer.args, global_num_experts=8)
    other = ExpertPlacement.round_robin(E, 2).expert_map(0)
    with pytest.raises(
        ValueError, match=r"expert_map must have the experts of this rank, .* got one of others"
    ):
        kernel(*layer.args, expert_map=other)
    mine = parts.expert_map
    parts._check_map(torch.where(mine >= 0, 3 - mine, mine))  # another order of the same experts
    whole = make_layer(E=E)
    with pytest.raises(ValueError, match=r"hold the 4 experts of this rank, got 8; .*w1\[list\(placement"):
        kernel(*whole.args, expert_map=parts.expert_map)


@pytest.mark.gpu
@torch.no_grad()
def test_captured_in_a_cuda_graph(tmp_path: Path) -> None:
    """Over NCCL, on one rank: nothing synchronizes, and replays under other routings have each its own count."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    graph = torch.cuda.CUDAGraph()
    try:
        _captured_and_replayed(graph)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        # NCCL waits for the graphs that hold its collectives.
        graph.reset()
        dist.destroy_process_group()


def _captured_and_replayed(graph: torch.cuda.CUDAGraph) -> None:
    parts = BatchedAllToAllPrepareAndFinalize(ExpertPlacement.linear(5, 1), 4)
    kernel = FusedMoEModularKernel(parts, BatchedTritonExperts(4))
    layers = [make_layer(M=20, routing=routing, device="cuda") for routing in ("random", "one", "empty")]
    static = [t.clone() for t in layers[0].args]

    def call() -> Tensor:
        return kernel(*static, expert_map=parts.expert_map)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    call()
    torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        result = call()
    num_dropped = parts.num_dropped
    assert num_dropped is not None
    for layer in layers:
        for t, given in zip(static, layer.args, strict=True):
            t.copy_(given)
        graph.replay()
        remaining = kept(layer, 4)
        assert_as_accurate(result, remaining.layer)
        assert num_dropped.tolist() == remaining.num_dropped
