"""The host's share of an eager call of :func:`compile_moe.fused_experts`: the call against its bare launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel

import compile_moe
from compile_moe.cli.bench_results import HostTime
from compile_moe.cli.contestants.contestant import Inputs
from compile_moe.cli.contestants.expert_weights import ExpertWeights
from compile_moe.cli.timing import host_seconds


class BareLaunch(NamedTuple):
    """A compiled kernel, its grid, and the arguments that one call gave it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]


def record(call: Callable[[], Any]) -> tuple[BareLaunch, ...]:
    """The compiled kernels that ``call`` launches, in order; it launches them as ever."""
    launches: list[BareLaunch] = []
    with _recording(launches):
        call()
    return tuple(launches)


def launch_all(launches: tuple[BareLaunch, ...]) -> None:
    for kernel, grid, args in launches:
        kernel[grid](*args)


def measure_host_time(weights: ExpertWeights, inputs: Inputs) -> HostTime:
    """Both times, one after the other, on a GPU that has nothing else to do."""
    hidden_states, ids, topk_weights = inputs
    activation: Any = weights.activation or weights.function

    def call() -> Any:
        return compile_moe.fused_experts(
            hidden_states,
            weights.w1,
            weights.w2,
            topk_weights,
            ids,
            activation=activation,
            w1_bias=weights.w1_bias,
            w2_bias=weights.w2_bias,
        )

    call()
    launches = record(call)
    device = hidden_states.device
    called, launched = (
        host_seconds(call, device) * 1e6,
        host_seconds(lambda: launch_all(launches), device) * 1e6,
    )
    names = tuple(launch.kernel.name for launch in launches)
    return HostTime(weights.w1.size(0), ids.size(0), called, launched, names)


@contextmanager
def _recording(launches: list[BareLaunch]) -> Iterator[None]:
    original = CompiledKernel.__getitem__

    def recording(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        run = original(kernel, grid)

        def recorded(*args: Any, **options: Any) -> None:
            launches.append(BareLaunch(kernel, grid, args))
            run(*args, **options)

        return recorded

    CompiledKernel.__getitem__ = recording
    hook = knobs.runtime.launch_enter_hook
    # Launches that go past the method don't when there is a hook.
    knobs.runtime.launch_enter_hook = lambda metadata: None
    try:
        yield
    finally:
        CompiledKernel.__getitem__ = original
        knobs.runtime.launch_enter_hook = hook
