"""Experts on two GPUs, over NCCL: what test_expert_parallel.py checks with gloo, and what only GPUs have."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.multiprocessing.spawn import ProcessExitedException

from compile_moe import (
    AllGatherPrepareAndFinalize,
    BatchedAllToAllPrepareAndFinalize,
    BatchedTritonExperts,
    ExpertPlacement,
    FusedMoEModularKernel,
    TritonExperts,
)
from tests.support.expert_parallel import Case, make_shard, run_cases
from tests.support.oracle import assert_as_accurate
from tests.support.profiled import travelling
from tests.support.ranks import spawn
from tests.support.tensor_parallel import make_tensor_shard, run_tensor_parallel
from tests.test_expert_parallel import OVERLAP


def _eager(rank: int, num_ranks: int, seed: int) -> None:
    run_cases(rank, num_ranks, seed, 5, device="cuda")
    run_tensor_parallel(rank, num_ranks, seed, device="cuda")


def _compiled(rank: int, num_ranks: int, seed: int) -> None:
    """Through inductor, one graph for all numbers of tokens."""
    for kind in ("all_to_all", "all_gather", "all_gather_at_most_9", "batched_all_to_all"):
        torch.compiler.reset()
        torch.manual_seed(seed)
        counter = CompileCounterWithBackend("inductor")
        variant = "" if kind == "all_gather_at_most_9" else "fp8_w8a8_channel"
        case = Case(kind, "replicated", layer={"skipped": True, "topk": 3}, variant=variant, device="cuda")
        for num_tokens in ([4, 7], [9, 2], [3, 8]):
            shard = make_shard(case, rank, num_ranks, num_tokens)
            compiled = torch.compile(shard.kernel, fullgraph=True, backend=counter)
            x, w1, w2, weights, ids = shard.args
            for t in (x, weights, ids):
                torch._dynamo.mark_dynamic(t, 0)
            shard.check(compiled(x, w1, w2, weights, ids, **shard.options))
        assert counter.frame_count == 1, f"{kind} compiled {counter.frame_count} times"
    torch.compiler.reset()
    shard = make_tensor_shard("all_to_all", rank, num_ranks, device="cuda")
    compiled = torch.compile(shard.kernel, fullgraph=True)
    shard.check(compiled(*shard.args, **shard.options))


#: What a CUDA graph can hold: no rank waits for the numbers of rows.
STATIC = [
    Case("batched_all_to_all", "replicated", "even", max_tokens_per_rank=3),
    Case("all_gather_equal", "replicated", "even"),
]


def _others(case: Case, rank: int, seed: int) -> list[Any]:
    """The same layer under other routings, experts without tokens and skipped slots among them."""
    shards = []
    for options in ({}, {"routing": "one"}, {"routing": "empty"}, {"skipped": True}):
        torch.manual_seed(seed)
        layer = {"topk": 3, "dtype": torch.bfloat16, **options}
        shards.append(make_shard(replace(case, layer=layer, device="cuda"), rank, 2))
    return shards


def _replayed(rank: int, num_ranks: int, seed: int) -> None:
    """A graph that the caller captured, without the host waiting for the GPU."""
    for case in STATIC:
        shards = _others(case, rank, seed)
        static = [t.clone() for t in shards[0].args]
        kernel, options = shards[0].kernel, shards[0].options

        def call(kernel: Any = kernel, static: Any = static, options: Any = options) -> Tensor:
            return kernel(*static, **options)

        call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        call()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        for shard in shards:
            for t, given in zip(static, shard.args, strict=True):
                t.copy_(given)
            graph.replay()
            # The captured kernel's counter.
            shard.kernel = kernel
            shard.check(result)


def _reduce_overhead(rank: int, num_ranks: int, seed: int) -> None:
    """Inductor's own CUDA graphs."""
    for case in STATIC:
        torch.compiler.reset()
        counters.clear()
        shards = _others(case, rank, seed)
        kernel, options = shards[0].kernel, shards[0].options

        def call(*args: Tensor, kernel: Any = kernel, options: Any = options) -> tuple[Tensor, Tensor | None]:
            return kernel(*args, **options), getattr(kernel.prepare_finalize, "num_dropped", None)

        compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
        weights = shards[0].args[1:3]
        for shard in [shards[0], shards[0], *shards]:
            x, _, _, *routing = shard.args
            result, num_dropped = compiled(x, *weights, *routing)
            if num_dropped is not None:
                assert num_dropped.tolist() == shard.num_dropped
            assert_as_accurate(result, shard.tokens)
        assert not counters["inductor"]["cudagraph_skips"]


def _overlap(rank: int, num_ranks: int, seed: int) -> None:
    """A shared expert runs while tokens travel: between the steps of a call, and where inductor is asked to."""
    torch.manual_seed(seed)
    M, K, I, E, topk = 4096, 2048, 768, 32, 8
    placement = ExpertPlacement.linear(E, num_ranks)
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(M, K, **make)
    w1, w2 = (torch.randn(E // 2, *size, **make) * size[1] ** -0.5 for size in ((2 * I, K), (K, I)))
    up, down = (torch.randn(*size, **make) * size[0] ** -0.5 for size in ((K, 4 * I), (4 * I, K)))
    weights, ids = torch.rand(M, E, device="cuda").topk(topk)
    room = int(torch.bincount(ids.flatten(), minlength=E).max())
    room = max(int(n) for n in _of_all(room))
    batched = BatchedAllToAllPrepareAndFinalize(placement, room)
    gathered = AllGatherPrepareAndFinalize(placement, num_tokens="equal")
    for parts, experts in (
        (gathered, TritonExperts()),
        (batched, BatchedTritonExperts(batched.max_num_tokens)),
    ):
        kernel = FusedMoEModularKernel(parts, experts)
        args = x, w1, w2, weights, ids
        options = {"expert_map": parts.expert_map}

        def in_order(kernel: Any = kernel, args: Any = args, options: Any = options) -> tuple[Tensor, Tensor]:
            return kernel(*args, **options), (x @ up).relu() @ down

        def in_steps(kernel: Any = kernel, args: Any = args, options: Any = options) -> tuple[Tensor, Tensor]:
            call = kernel.start(*args, **options)
            inner = (x @ up).relu()
            call.compute()
            shared = inner @ down
            return call.result(), shared

        torch.compiler.reset()
        ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
            "in order": in_order,
            "in steps": in_steps,
            "compiled": torch.compile(in_order, fullgraph=True, options=OVERLAP),
        }
        expected = in_order()
        beside: dict[str, float] = {}
        for name, way in ways.items():
            torch.testing.assert_close(way(), expected, rtol=2e-2, atol=2e-2)
            way()
            # What NCCL's kernels wait for the other rank counts, too: the best of some.
            shares = [
                travelling(way, lambda: dist.all_reduce(torch.zeros(1, device="cuda"))) for _ in range(3)
            ]
            beside[name] = max(shared for _, shared in shares)
            print(f"rank {rank}, {type(parts).__name__}, {name}: of µs of NCCL, beside others: {shares}")
        # A GEMM of the shared expert takes 70 µs on an H200.
        assert min(beside["in steps"], beside["compiled"]) > 10 + 3 * beside["in order"], beside


def _of_all(number: int) -> list[Any]:
    numbers: list[Any] = [None, None]
    dist.all_gather_object(numbers, number)
    return numbers


_PARTS = {
    "eager": _eager,
    "compiled": _compiled,
    "replayed": _replayed,
    "reduce_overhead": _reduce_overhead,
    "overlap": _overlap,
}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("part", _PARTS)
def test_two_gpus(part: str, seeded: int, tmp_path: Path) -> None:
    spawn(_PARTS[part], 2, tmp_path, seeded, backend="nccl")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_rank_that_hangs(seeded: int, tmp_path: Path) -> None:
    """NCCL's watchdog ends the process that waits for it, when the group's timeout is over."""
    with pytest.raises(ProcessExitedException, match="SIGABRT"):
        spawn(_wait_for_nobody, 2, tmp_path, tmp_path, seeded, backend="nccl")
    assert (tmp_path / "waits").exists()


def _wait_for_nobody(rank: int, num_ranks: int, folder: Path, seed: int) -> None:
    case = Case("all_gather_equal", "linear", "even", device="cuda")
    torch.manual_seed(seed)
    # What compiles, before the short timeout counts.
    first = make_shard(case, rank, num_ranks)
    first.check(first.kernel(*first.args, **first.options))
    # Four times that is how long the watchdog then waits for records of all ranks.
    os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "500"
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    parts = AllGatherPrepareAndFinalize(ExpertPlacement.linear(6, num_ranks), group, num_tokens="equal")
    shard = make_shard(case, rank, num_ranks, parts=parts)
    dist.barrier()
    shard.kernel(*shard.args, **shard.options)
    torch.cuda.synchronize()
    if rank == 0:
        (folder / "waits").touch()
        shard.kernel(*shard.args, **shard.options)
        torch.cuda.synchronize()
    time.sleep(60)
    raise AssertionError("waited for longer than the timeout")
