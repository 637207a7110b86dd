"""How long calls take on a device, and how fast that device is at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

_SECONDS = 0.25  # of measuring, at least, where that takes fewer than _MOST_REPETITIONS
_MOST_REPETITIONS = 50


class Ceilings(NamedTuple):
    """What a device reached: matrix products in FLOP/s, copies in bytes/s, read and written."""

    flops: float
    bandwidth: float


def capture(calls: Sequence[Call]) -> Call:
    """One CUDA graph of all calls, one after the other; they must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def seconds_per_call(calls: Sequence[Call], device: torch.device, as_graph: bool) -> float:
    """Median seconds of one of ``calls``, which run one after the other; several, so that no cache holds their data.

    Args:
        as_graph: replay them as a CUDA graph; otherwise the host launches them.
    """
    for call in calls:
        call()
    if as_graph:
        replay = capture(calls)
        replay()
        return _median(replay, device) / len(calls)

    def run() -> None:
        for call in calls:
            call()

    return _median(run, device) / len(calls)


def host_seconds(call: Call, device: torch.device) -> float:
    """Median seconds until ``call`` returns, on a GPU that has nothing else to do."""
    seconds = []
    for _ in range(_MOST_REPETITIONS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Of a square matrix product and of a copy, both too large for caches."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * n**3 / seconds_per_call([lambda: a @ b], device, False)
    source = torch.empty(2**30 if on_gpu else 2**26, device=device, dtype=torch.uint8).zero_()
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds_per_call([lambda: target.copy_(source)], device, False)
    return Ceilings(flops, bandwidth)


def _median(call: Call, device: torch.device) -> float:
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < _MOST_REPETITIONS and time.perf_counter() - start < _SECONDS):
        seconds.append(_time(call, device))
    return statistics.median(seconds)


def _time(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
    return before.elapsed_time(after) / 1e3
