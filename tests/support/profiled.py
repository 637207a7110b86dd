"""What the profiler sees of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

#: Ranges that torch marks, which are among the GPU's events, too.
_RANGES = "Torch-Compiled Region", "##", "ProfilerStep", "nccl:", "record_param"


def profiled(call: Callable[[], Any]) -> Any:
    """Events of the host and of the GPU."""
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return profiler.events()


def on_gpu(call: Callable[[], Any]) -> list[str]:
    """What runs on the GPU, in order: kernels, copies and fills."""
    events = [event for event in profiled(call) if event.device_type.name == "CUDA"]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    return [name for name in names if not name.startswith(_RANGES)]


def travelling(call: Callable[[], Any], together: Callable[[], Any]) -> tuple[float, float]:
    """µs in which NCCL's kernels run on this GPU, and those of them in which others do, too.

    Behind ``together``, a collective that is left out: ranks begin at once. In front of both the GPU idles, so that the
    host is ahead of it.
    """

    def all_queued() -> None:
        torch.cuda._sleep(20_000_000)
        together()
        call()

    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiled(all_queued):
        if event.device_type.name == "CUDA" and not event.name.startswith(_RANGES):
            span = event.time_range.start, event.time_range.end
            spans[event.name.startswith("ncclDevKernel")].append(span)
    _, *collectives = sorted(spans[True])
    shared = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in collectives
        for other_start, other_end in spans[False]
    )
    return sum(end - start for start, end in collectives), shared
