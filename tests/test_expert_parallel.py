"""Expert parallelism over gloo: every rank's result equals that of one rank that has all experts.

Starting processes and compiling take most of the time: two tests run many cases each, and name the one that fails.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from compile_moe import AllToAllPrepareAndFinalize
from tests.support.expert_parallel import Case, make_shard, placements, run_cases
from tests.support.ranks import spawn


def test_four_ranks(seeded: int, tmp_path: Path) -> None:
    spawn(run_cases, 4, tmp_path, seeded, 3)


def test_two_ranks(seeded: int, tmp_path: Path) -> None:
    spawn(_two_ranks, 2, tmp_path, seeded)


def _two_ranks(rank: int, num_ranks: int, seed: int) -> None:
    run_cases(rank, num_ranks, seed)
    _two_groups(rank, seed)
    _compiled_once(rank, seed, "all_gather", "")
    _compiled_once(rank, seed, "all_gather_at_most_9", "")
    # Through inductor in the example.
    _compiled_once(rank, seed, "batched_all_to_all", "fp8_w8a8_channel", "aot_eager")
    compiled = _compiled_once(rank, seed, "all_to_all", "fp8_w8a8_channel")
    _rank_that_hangs(rank, seed)
    # Last, as it leaves a group of one.
    _rank_that_fails(rank, seed, compiled)


def _two_groups(rank: int, seed: int) -> None:
    """A group of its own for each rank: all experts are there, and nothing is exchanged with the other."""
    groups = [dist.new_group([r]) for r in range(2)]
    with pytest.raises(ValueError, match="this process is not in the group"):
        AllToAllPrepareAndFinalize(placements(2)["linear"], groups[1 - rank])
    with pytest.raises(ValueError, match="for the ranks of the group, 1, got one for 2"):
        AllToAllPrepareAndFinalize(placements(2)["linear"], groups[rank])


def _compiled_once(
    rank: int, seed: int, parts: str, variant: str, backend: str = "inductor"
) -> Callable[..., Tensor]:
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
    return compiled


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


def _rank_that_fails(rank: int, seed: int, compiled: Callable[..., Tensor]) -> None:
    """The error of one rank's experts ends that rank, and then the others, compiled or not."""
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
