"""How many kernels one call of a module runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

#: What :func:`count` counts on each type of device.
COUNTED = {
    "cuda": "kernels launched on the GPU",
    "cpu": "operators called and C++ kernels generated, without views, allocations and reads of single values",
}
_READS = ("aten::item", "aten::is_nonzero")


def compile_for_count(module: nn.Module, device: torch.device) -> Callable[..., Any]:
    """The module compiled so that :func:`count` sees its generated kernels."""
    options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp.enable_kernel_profile": True}
    return torch.compile(module, options=options if device.type == "cpu" else None)


def count(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels that ``call`` runs: on a GPU, launches without copies and fills by the driver; on the CPU, the
    outermost operators and generated kernels.

    ``call`` must have run before, or what compiling it runs counts too.
    """
    if device.type == "cuda":
        return len(gpu_kernels(call, device))
    return _count_work(event for event in _events(call, device) if event.cpu_parent is None)


def gpu_kernels(call: Callable[[], Any], device: torch.device) -> list[str]:
    """Names of the kernels that ``call`` launches, in order, without copies and fills by the driver."""
    return [
        event.name
        for event in sorted(_events(call, device), key=lambda event: event.time_range.start)
        if event.device_type.name == "CUDA"
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    ]


def _events(call: Callable[[], Any], device: torch.device) -> Iterable[Any]:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # Else the profiler's C++ part reports its start and stop on stderr; read at its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: Any = profiler.events()
    return events


def _count_work(events: Iterable[Any]) -> int:
    total = 0
    for event in events:
        if _is_work(event.name):
            total += 1
        elif event.name not in _READS:
            # A region that groups calls, such as a compiled graph, or a view that may have to copy.
            total += _count_work(event.cpu_children)
    return total


def _is_work(name: str) -> bool:
    namespace, separator, op = name.partition("::")
    if not separator:
        return "cpp_fused" in name
    if namespace != "aten":
        return True
    if name in _READS or op.startswith(("empty", "new_empty")) or op == "_unsafe_view":
        return False
    packet = getattr(torch.ops.aten, op, None)
    # Any, because slice and split have overloads for lists and strings as well.
    return packet is None or not any(getattr(packet, overload).is_view for overload in packet.overloads())
