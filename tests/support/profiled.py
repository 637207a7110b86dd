"""What the profiler sees of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


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
    # Ranges that torch marks are there, too.
    return [name for name in names if not name.startswith(("Torch-Compiled Region", "##", "ProfilerStep"))]
