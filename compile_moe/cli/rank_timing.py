"""How long work takes that all ranks of a group do together, and how fast they exchange bytes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from compile_moe.cli.refusal import Refusal
from compile_moe.cli.timing import capture

_REPETITIONS = 20


class Ranks(NamedTuple):
    """This process among the others of the default group."""

    rank: int
    size: int
    device: torch.device


@contextmanager
def joined(command: str) -> Iterator[Ranks]:
    """The group that torchrun started: NCCL where every process of this machine has a GPU of its own, else gloo.

    Raises:
        Refusal: torchrun did not start this process.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        raise Refusal(
            f"{command} runs on every rank: torchrun --nproc-per-node=2 -m compile_moe {command} ..."
        )
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    # Not after an error: it would wait for ranks that had none.
    dist.destroy_process_group()


def seconds_together(calls: Sequence[Callable[[], Any]], ranks: Ranks, as_graph: bool = False) -> float:
    """Median seconds of one of ``calls``, which all ranks make as often, one after the other: of the slowest rank.

    Args:
        as_graph: replay them as a CUDA graph; otherwise the host launches them.
    """

    def run() -> None:
        for call in calls:
            call()

    for _ in range(3):
        run()
    timed: Callable[[], Any] = run
    if as_graph:
        timed = capture(calls)
        timed()
    seconds = slowest([_seconds(timed, ranks) for _ in range(_REPETITIONS)], ranks)
    return statistics.median(seconds) / len(calls)


def slowest(values: Sequence[float], ranks: Ranks) -> list[float]:
    """The largest of each value among the ranks."""
    largest = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def _seconds(call: Callable[[], Any], ranks: Ranks) -> float:
    if ranks.device.type == "cpu":
        dist.barrier()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    # A collective in front: the ranks' GPUs start together.
    dist.all_reduce(torch.zeros(1, device=ranks.device))
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def all_to_all(num_sent: Tensor, row_bytes: int, ranks: Ranks) -> Callable[[], Any]:
    """The backend's own, of rows of bytes: ``num_sent`` (ranks, ranks), from a rank (rows) to another (columns)."""
    sent, received = num_sent[ranks.rank].tolist(), num_sent[:, ranks.rank].tolist()
    source, target = (
        torch.zeros(sum(rows), row_bytes, dtype=torch.uint8, device=ranks.device) for rows in (sent, received)
    )
    return lambda: dist.all_to_all_single(target, source, received, sent)


def all_gather(num_rows: int, row_bytes: int, ranks: Ranks) -> Callable[[], Any]:
    """The backend's own, of rows of bytes."""
    source = torch.zeros(num_rows, row_bytes, dtype=torch.uint8, device=ranks.device)
    target = source.repeat(ranks.size, 1)
    # Newer versions of torch have another name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return lambda: gather(target, source)


def reduce_scatter(num_rows: int, like: Tensor, ranks: Ranks) -> Callable[[], Any]:
    """The backend's own, of rows as those of ``like``."""
    target = like.new_zeros(num_rows, like.size(1))
    source = target.repeat(ranks.size, 1)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return lambda: scatter(target, source)


def busiest_bytes(num_sent: Tensor, row_bytes: int) -> int:
    """Bytes that the busiest rank sends to others or gets from them."""
    others = num_sent.clone().fill_diagonal_(0)
    return int(torch.maximum(others.sum(0), others.sum(1)).max()) * row_bytes


def measure_links(ranks: Ranks) -> tuple[float, float]:
    """Seconds of an exchange of nearly nothing, and bytes/s that a rank sends to the others, of a large one."""
    each = torch.ones(ranks.size, ranks.size, dtype=torch.int64)
    on_gpus = ranks.device.type == "cuda"
    latency = seconds_together([all_to_all(each, 16, ranks)] * 4, ranks, on_gpus)
    row_bytes = 2**26 if on_gpus else 2**20
    seconds = seconds_together([all_to_all(each, row_bytes, ranks)] * 4, ranks, on_gpus)
    return latency, busiest_bytes(each, row_bytes) / max(seconds - latency, 1e-9)
