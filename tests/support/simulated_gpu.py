"""A Triton driver without a GPU: kernels compile for sm_90, up to Triton's IR, and "load"; launches are recorded.

Shows what launchers do around the kernels: which variants compile and when, and that other token counts, or a graph
capture, find theirs loaded.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime import driver

from compile_moe.ops.kernels import launch, remembered_calls
from compile_moe.ops.kernels.epilogue import with_epilogue
from compile_moe.ops.kernels.quantized import multiply
from compile_moe.ops.kernels.quantized.few_rows import launches as few_rows
from compile_moe.ops.kernels.warp_specialized import gather_gemm as warp_specialized


class SimulatedGPU:
    """What happened on the device."""

    def __init__(self) -> None:
        self.loaded: list[str] = []  # kernels whose modules were loaded, by name
        self.launched: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []  # of each launch
        self.on_launch: Callable[[], None] = lambda: None
        self.capturing = False


class _Module:
    """What was loaded onto the device."""


class _Driver:
    def __init__(self, gpu: SimulatedGPU) -> None:
        def load_binary(name: str, *rest: Any) -> tuple[Any, ...]:
            gpu.loaded.append(name)
            return _Module(), 1, 32, 0, 1024

        def launcher(source: Any, metadata: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> None:
                gpu.launched.append(metadata.name)
                gpu.arguments.append(args[9:])  # behind grid, stream and what the compiler wants
                gpu.on_launch()

            return run

        properties = {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
        }
        self.launcher_cls = launcher
        self.utils = SimpleNamespace(
            load_binary=load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: properties,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def simulated_gpu() -> Iterator[SimulatedGPU]:
    """Launchers take CPU tensors for tensors on a GPU; every kernel starts unloaded."""
    gpu = SimulatedGPU()
    modules = [m for name, m in sys.modules.items() if name.startswith("compile_moe.ops.kernels.")]
    before = getattr(driver, "_active", None)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(launch, "is_cuda", lambda device: True))
        patches.enter_context(mock.patch.object(launch, "is_current_device", lambda index: True))
        patches.enter_context(
            mock.patch.object(launch, "empty_strided", torch._C._dynamo.guards._empty_strided_cpu)
        )
        for cache in ("_loaded", "_ready"):
            patches.enter_context(mock.patch.object(launch, cache, {}))
        patches.enter_context(
            mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
        )
        patches.enter_context(_up_to_ir())
        _forget_kernels(modules)
        remembered_calls.forget()
        driver.set_active(_Driver(gpu))
        try:
            yield gpu
        finally:
            remembered_calls.forget()
            _forget_kernels(modules)
            _unload()
            driver._active = before


@contextlib.contextmanager
def _up_to_ir() -> Iterator[None]:
    """What follows takes nearly all the time, and nothing runs it here; the tests ahead of time have it.

    The results have a cache of their own.
    """
    shipped = CUDABackend.add_stages

    def add_stages(backend: CUDABackend, stages: dict[str, Any], *others: Any) -> None:
        shipped(backend, stages, *others)
        # Gluon's first is "ttgir" in Triton 3.6.
        for name in list(stages)[1:]:
            del stages[name]
        stages["cubin"] = without_code

    def without_code(module: Any, metadata: dict[str, Any]) -> bytes:
        metadata.update(name=module.get_entry_func_name(), shared=0, tmem_size=0)
        return b""

    with triton.knobs.cache.scope(), mock.patch.object(CUDABackend, "add_stages", add_stages):
        triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir, "compile_moe_tests_up_to_ir"))
        yield


def _unload() -> None:
    """Leave nothing to unload to kernels that outlive the device: they would look for it when they go.

    That may be in the middle of anything, and the warning that follows breaks what parses Python then (CPython 3.11).
    """
    for kernel in gc.get_objects():
        if type(kernel) is CompiledKernel and isinstance(kernel.module, _Module):
            kernel.module = None


def _forget_kernels(modules: Iterable[ModuleType]) -> None:
    """Triton keeps with a kernel what it loaded, and so do the caches of kernels with an epilogue."""
    with_epilogue.cache_clear()
    multiply.with_format.cache_clear()
    few_rows.with_format.cache_clear()
    warp_specialized.with_epilogue.cache_clear()
    for module in modules:
        for value in vars(module).values():
            if hasattr(value, "device_caches"):
                value.device_caches.clear()
