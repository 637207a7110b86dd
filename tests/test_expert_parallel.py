"""Expert parallelism over gloo: every rank's result equals that of one rank that has all experts.

Starting processes and compiling take most of the time: two tests run many cases each, and name the one that fails.
"""

from __future__ import annotations

import copy
import datetime
import gc
import time
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from compile_moe import AllToAllPrepareAndFinalize, TritonExperts
from compile_moe.prepare_finalize import all_gather, all_to_all, collectives
from tests.support.bench_ranks import measure_on_ranks
from tests.support.expert_parallel import Case, make_shard, placements, run_cases
from tests.support.ranks import spawn
from tests.support.tensor_parallel import make_tensor_shard, run_tensor_parallel

#: What lets inductor compute while collectives run, as the README has it.
OVERLAP = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}


def test_four_ranks(seeded: int, tmp_path: Path) -> None:
    spawn(_four_ranks, 4, tmp_path, seeded)


def _four_ranks(rank: int, num_ranks: int, seed: int) -> None:
    run_cases(rank, num_ranks, seed, 3)
    run_tensor_parallel(rank, num_ranks, seed)


def test_two_ranks(seeded: int, tmp_path: Path) -> None:
    spawn(_two_ranks, 2, tmp_path, seeded)


def _two_ranks(rank: int, num_ranks: int, seed: int) -> None:
    run_cases(rank, num_ranks, seed)
    run_tensor_parallel(rank, num_ranks, seed)
    measure_on_ranks(rank, num_ranks, seed)
    _gathered(rank)
    _two_groups(rank, seed)
    _starts_without_waiting(rank, seed)
    _microbatches(rank, seed)
    _failed_calls(rank, seed)
    _gradients(rank, seed)
    _memory(rank, seed)
    _inductor_overlaps(rank, seed)
    _compiled_tensor_parallel(rank, seed)
    # Through inductor the last of them, and in the example.
    _compiled_once(rank, seed, "all_gather", "", "aot_eager")
    _compiled_once(rank, seed, "all_gather_at_most_9", "", "aot_eager")
    _compiled_once(rank, seed, "batched_all_to_all", "fp8_w8a8_channel", "aot_eager")
    _compiled_once(rank, seed, "all_to_all", "fp8_w8a8_channel", "inductor")
    _rank_that_hangs(rank, seed)
    # Last, as it leaves a group of one.
    _rank_that_fails(rank, seed)


def _gathered(rank: int) -> None:
    """As between CPUs, and by the op that GPUs take, one at a time."""
    group = collectives.find_group(None)
    expected = torch.cat([torch.arange(6).view(3, 2) + 10 * r for r in range(2)])
    for device in ("cpu", "cuda"):
        started = collectives.all_gather(
            [expected[3 * rank :][:3]], group._replace(device=torch.device(device))
        )
        (result,) = collectives.wait(started)
        assert torch.equal(result, expected)


def _two_groups(rank: int, seed: int) -> None:
    """A group of its own for each rank: all experts are there, and nothing is exchanged with the other."""
    groups = [dist.new_group([r]) for r in range(2)]
    with pytest.raises(ValueError, match="this process is not in the group"):
        AllToAllPrepareAndFinalize(placements(2)["linear"], groups[1 - rank])
    with pytest.raises(ValueError, match="for the ranks of the group, 1, got one for 2"):
        AllToAllPrepareAndFinalize(placements(2)["linear"], groups[rank])


def _compiled_once(rank: int, seed: int, parts: str, variant: str, backend: str) -> None:
    """One graph for all numbers of tokens, and for all layers."""
    torch.compiler.reset()
    torch.manual_seed(seed)
    counter = CompileCounterWithBackend(backend)
    layer = {"skipped": True, "topk": 3}
    # The largest count drops slots.
    case = Case(parts, "replicated", layer=layer, variant=variant, max_tokens_per_rank=2)
    for i, num_tokens in enumerate(([4, 7], [9, 2], [3, 8], [2, 2])):
        shard = make_shard(case, rank, 2, num_tokens)
        compiled = torch.compile(shard.kernel, fullgraph=True, backend=counter)
        x, w1, w2, weights, ids = shard.args
        for t in (x, weights, ids):
            torch._dynamo.mark_dynamic(t, 0)
        for _ in range(2 if i == 0 else 1):
            result = compiled(x, w1, w2, weights, ids, **shard.options)
            shard.check(result)
    assert counter.frame_count == 1, f"{parts} compiled {counter.frame_count} times"
    if case.is_batched:
        values = [node.meta.get("example_value") for node in counter.graphs[0].graph.nodes]
        assert not free_unbacked_symbols([v for v in values if v is not None]), (
            "sizes that the host waits for"
        )


def _starts_without_waiting(rank: int, seed: int) -> None:
    """One rank sends its tokens, and goes on, before the other begins; and so on the way back."""
    torch.manual_seed(seed)
    shard = make_shard(Case("all_gather_equal", num_tokens="even"), rank, 2)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["rank 0 has started"])
    call = shard.kernel.start(*shard.args, **shard.options)
    if rank == 0:
        store.set("rank 0 has started", "")
    else:
        store.wait(["rank 0 has computed"])
    call.compute()
    if rank == 0:
        # Rank 1 has sent its tokens, but nothing back.
        store.set("rank 0 has computed", "")
    result = call.result()
    shard.check(result)
    call.compute()
    assert call.result() is result


def _microbatches(rank: int, seed: int) -> None:
    """Many calls under way, each through parts of its own."""
    torch.manual_seed(seed)
    kinds = ("all_to_all", "all_gather", "batched_all_to_all")
    shards = [make_shard(Case(parts, layer={"skipped": True}), rank, 2) for parts in kinds]
    shards += [make_tensor_shard(kind, rank, 2) for kind in ("reduced", "batched", "one_device")]
    calls = [shard.kernel.start(*shard.args, **shard.options) for shard in shards]
    for call in calls[:-1]:
        call.compute()
    for shard, call in zip(shards, calls, strict=True):
        shard.check(call.result())


def _failed_calls(rank: int, seed: int) -> None:
    """A call fails as often as it is asked; what it leaves can be copied, and later calls are as ever."""

    class Broken(TritonExperts):
        def apply(self, *args: Any, **options: Any) -> Tensor:
            raise ArithmeticError("broken")

    for kind in ("all_to_all", "batched_all_to_all"):
        torch.manual_seed(seed)
        shard = make_shard(Case(kind, "replicated"), rank, 2)
        experts, shard.kernel.fused_experts = shard.kernel.fused_experts, Broken()
        call = shard.kernel.start(*shard.args, **shard.options)
        with pytest.raises(ArithmeticError):
            call.compute()
        for again in (call.compute, call.result):
            with pytest.raises(RuntimeError, match="this call failed when it was computed"):
                again()
        shard.kernel = copy.deepcopy(shard.kernel)
        shard.kernel.fused_experts = experts
        shard.check(shard.kernel(*shard.args, **shard.options))


def _gradients(rank: int, seed: int) -> None:
    """Asking for those of the tokens raises, though all experts are frozen: collectives must not drop them silently."""
    torch.manual_seed(seed)
    shards = [
        make_shard(Case(parts), rank, 2) for parts in ("all_to_all", "all_gather", "batched_all_to_all")
    ]
    shards += [make_tensor_shard(kind, rank, 2) for kind in ("reduced", "one_device", "own_finalize")]
    for shard in shards:
        with torch.enable_grad():
            x, *others = shard.args
            result = shard.kernel(x.clone().requires_grad_(), *others, **shard.options)
            assert result.requires_grad
            with pytest.raises(NotImplementedError, match=r"no backward formula.* torch\.no_grad\(\)"):
                result.sum().backward()
        shard.check(result.detach())


def _memory(rank: int, seed: int) -> None:
    """While experts run, nothing is left of what was sent, but the layer's own tokens."""
    alive = []

    class Watched(TritonExperts):
        def apply(self, *args: Any, **options: Any) -> Tensor:
            gc.collect()
            alive.append([t() is not None for t in sent])
            return super().apply(*args, **options)

    def remember(tensors: Any, *args: Any) -> Any:
        started = exchange(tensors, *args)
        sent.extend(weakref.ref(t) for t in tensors)
        return started

    for kind, module in (("all_gather_equal", all_gather), ("all_to_all", all_to_all)):
        sent: list[Any] = []
        torch.manual_seed(seed)
        shard = make_shard(Case(kind, num_tokens="even"), rank, 2)
        shard.kernel.fused_experts = Watched()
        name = kind.removesuffix("_equal")
        exchange = getattr(module, name)
        with mock.patch.object(module, name, remember):
            shard.check(shard.kernel(*shard.args, **shard.options))
        # The tokens themselves may have been sent.
        assert len(alive[-1]) >= 2 and sum(alive[-1]) <= (kind == "all_gather_equal"), (kind, alive)


def _compiled_tensor_parallel(rank: int, seed: int) -> None:
    torch.compiler.reset()
    torch.manual_seed(seed)
    shard = make_tensor_shard("all_to_all", rank, 2)
    # Through inductor, also where a rank has no tokens.
    compiled = torch.compile(shard.kernel, fullgraph=True)
    shard.check(compiled(*shard.args, **shard.options))


def _inductor_overlaps(rank: int, seed: int) -> None:
    """A shared expert, written behind the layer, is computed while the tokens travel."""
    torch.compiler.reset()
    torch.manual_seed(seed)
    shard = make_shard(Case("all_gather_equal", num_tokens="even"), rank, 2)
    x = shard.args[0]
    w1, w2 = torch.randn(x.size(1), 32), torch.randn(32, x.size(1))

    def layer_and_shared_expert(*args: Tensor) -> tuple[Tensor, Tensor]:
        return shard.kernel(*args, **shard.options), (args[0] @ w1).relu() @ w2

    compiled = torch.compile(layer_and_shared_expert, fullgraph=True, options=OVERLAP)
    (result, shared), (code,) = run_and_get_code(compiled, *shard.args)
    shard.check(result)
    torch.testing.assert_close(shared, (x @ w1).relu() @ w2)
    sent = code.rindex("all_to_all_single.default(")
    assert sent < code.index("extern_kernels.mm(") < code.index("wait_tensor.default(", sent)


def _rank_that_hangs(rank: int, seed: int) -> None:
    """The other one gets an error when the group's timeout is over."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    torch.manual_seed(seed)
    case = Case("all_to_all", num_tokens="even")
    parts = AllToAllPrepareAndFinalize(placements(2)["round_robin"], group)
    shard = make_shard(case, rank, 2, parts=parts)
    if rank == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            shard.kernel(*shard.args, **shard.options)
        assert time.monotonic() - start < 20
    dist.barrier()


def _rank_that_fails(rank: int, seed: int) -> None:
    """The error of one rank's experts ends that rank, and then the others."""
    torch.manual_seed(seed)
    shard = make_shard(Case("all_to_all", num_tokens="even"), rank, 2)
    if rank == 1:
        ids = shard.args[4].clone()
        ids[0, 0] = 100
        with pytest.raises(ValueError, match="topk_ids must be below the number of experts, 6"):
            shard.kernel(*shard.args[:4], ids, **shard.options)
        return
    with pytest.raises(RuntimeError):
        shard.kernel(*shard.args, **shard.options)
