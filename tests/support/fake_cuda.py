"""Make inductor generate its GPU code on a machine without a GPU, so that tests can count and name kernels.

Tensors are fake and on "cuda"; the device's properties are those of an H100; compilation stops where inductor
would load the generated module. Works on CPU-only and CUDA builds of torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

SHARED_MEMORY = 227 * 1024

GUARD_SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::DeviceType;
static c10::impl::DeviceGuardImplRegistrar registrar(
    DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA>());
"""


class GeneratedKernels(NamedTuple):
    """What inductor generated for one graph."""

    code: str
    triton_kernels: list[str]  # names, in the order of their definitions
    op_calls: list[str]  # calls of ops of namespace compile_moe, in order: "gather_gemm" or "gather_gemm.out"
    extern_calls: list[str]  # every call that is not a generated kernel: "extern_kernels.mm", "torch.ops.…"


class _Generated(Exception):
    """Stops the compilation: the code exists."""


def generated_kernels(
    fn: Callable[..., Any],
    make_args: Callable[[], Sequence[Any]],
    dynamic_dims: Sequence[tuple[int, int]] = (),
    unbacked_dims: Sequence[tuple[int, int]] = (),
    capability: tuple[int, int] = (9, 0),
    **config: Any,
) -> GeneratedKernels:
    """Compile ``fn`` for a GPU that is not there, and return the code that inductor generates.

    Args:
        fn: a function or module; its parameters, if any, must be made inside ``make_args``' fake mode, too.
        make_args: returns the arguments, with device="cuda"; called under a FakeTensorMode.
        dynamic_dims: (argument, dimension) pairs for ``mark_dynamic``; ``unbacked_dims`` likewise.
        capability: compute capability that inductor sees.
        config: patches of inductor's config, with ``__`` for dots ("triton__cudagraphs").
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import fresh_cache

    codes: list[str] = []

    def stop(graph: Any) -> None:
        generated = graph.codegen_with_cpp_wrapper() if graph.cpp_wrapper else graph.codegen()
        codes.append(generated[0].value)
        raise _Generated

    patches = {name.replace("__", "."): value for name, value in config.items()}
    torch._dynamo.reset()
    with (
        fake_cuda(capability),
        FakeTensorMode(shape_env=ShapeEnv()),
        fresh_cache(),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        inductor_config.patch({"compile_threads": 1, "fx_graph_cache": False, **patches}),
        _unbacked_fake_inputs(),
        torch._functorch.config.patch({"enable_autograd_cache": False}),
        torch.no_grad(),
    ):
        arguments = make_args()
        for position, dim in dynamic_dims:
            torch._dynamo.mark_dynamic(arguments[position], dim)
        for position, dim in unbacked_dims:
            torch._dynamo.decorators.mark_unbacked(arguments[position], dim)
        try:
            torch.compile(fn, fullgraph=True)(*arguments)
        except Exception:
            # Dynamo wraps the exception; without code it is a real failure.
            if not codes:
                raise
        finally:
            torch._dynamo.reset()
    if len(codes) != 1:
        raise AssertionError(f"expected inductor to compile one graph, it compiled {len(codes)}")
    return _read(codes[0])


def _read(code: str) -> GeneratedKernels:
    body = code[code.index("def call(") :]
    externs = re.findall(r"\b(extern_kernels\.\w+|torch\.ops\.[\w.]+|aoti_torch_\w+)\(", body)
    ours = [
        c.removeprefix("torch.ops.compile_moe.") for c in externs if c.startswith("torch.ops.compile_moe.")
    ]
    return GeneratedKernels(
        code=code,
        triton_kernels=re.findall(r"^def (triton_\w+)\(", code, re.MULTILINE),
        op_calls=[c.removesuffix(".default") for c in ours],
        extern_calls=externs,
    )


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Let torch and Triton believe in one GPU of this capability, as far as generating code goes."""
    from torch._dynamo import device_interface
    from torch._inductor import utils as inductor_utils
    from torch._inductor.fx_passes import misc_patterns
    from torch._inductor.runtime import hints
    from torch._subclasses import fake_tensor
    from torch.utils import _triton as triton_checks
    from triton.runtime import driver

    if not torch.backends.cuda.is_built():
        _load_device_guard()
    properties = _device_properties(capability)
    interface = device_interface.CudaInterface
    # Interfaces register lazily; they must do so before the class is patched.
    device_interface.get_interface_for_device("cuda")

    def clear_caches() -> None:
        for module in (triton_checks, inductor_utils):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
        hints.DeviceProperties.create.cache_clear()

    with ExitStack() as stack:

        def patch(target: Any, name: str, value: Any, **options: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value, **options))

        for name, value in _cuda_functions(properties, capability).items():
            patch(torch.cuda, name, value)
            if hasattr(interface, name):
                patch(interface, name, staticmethod(value))
        patch(torch.version, "cuda", torch.version.cuda or "12.8")
        patch(torch._C, "_cuda_getDeviceCount", lambda: 1, create=True)
        patch(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True)
        patch(interface, "get_raw_stream", staticmethod(lambda index: 0))
        patch(interface.Worker, "get_device_properties", staticmethod(lambda *args: properties))
        patch(interface.Worker, "current_device", staticmethod(lambda: 0))
        if hasattr(inductor_utils, "get_gpu_shared_memory"):
            patch(inductor_utils, "get_gpu_shared_memory", lambda *args: SHARED_MEMORY)
        # Fake tensors would initialise the driver.
        if hasattr(fake_tensor, "init_gpu_context"):
            patch(fake_tensor, "init_gpu_context", lambda *args: None)
        patch(FakeTensorMode, "avoid_device_init", property(lambda self: True))
        # These patterns trace randperm(device="cuda"), which needs a real generator.
        patch(misc_patterns, "_misc_patterns_init", lambda *args: None)
        active = getattr(driver, "_active", None)
        driver.set_active(_FakeDriver(capability))
        clear_caches()
        try:
            yield
        finally:
            driver._active = active
            clear_caches()


@contextmanager
def _unbacked_fake_inputs() -> Iterator[None]:
    """Let ``mark_unbacked`` hold for fake inputs; torch 2.13 drops it for those from another fake mode."""
    name = "transfer_symbols_from_foreign_shape_env"
    shipped = getattr(ShapeEnv, name, None)
    if shipped is None:
        yield
        return

    def transfer(self: Any, sizes: Any, strides: Any, offset: Any, source: Any, **context: Any) -> Any:
        if any(isinstance(size, torch.SymInt) for size in sizes):
            return shipped(self, sizes, strides, offset, source, **context)
        marks = [False] * len(sizes)  # what real inputs pass
        create = self._create_symbolic_sizes_strides_storage_offset
        return create(sizes, strides, offset, marks, source, **context)

    with mock.patch.object(ShapeEnv, name, transfer):
        yield


def _device_properties(capability: tuple[int, int]) -> SimpleNamespace:
    return SimpleNamespace(
        name="fake GPU",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=SHARED_MEMORY,
        shared_memory_per_multiprocessor=SHARED_MEMORY + 1024,
        L2_cache_size=50 << 20,
        gcnArchName="",
    )


def _cuda_functions(
    properties: SimpleNamespace, capability: tuple[int, int]
) -> dict[str, Callable[..., Any]]:
    stream = SimpleNamespace(stream_id=0, device=torch.device("cuda", 0), cuda_stream=0)
    constants = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "current_stream": stream,
        "synchronize": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_rng_state": None,
    }
    functions: dict[str, Callable[..., Any]] = {
        name: functools.partial(_return, value) for name, value in constants.items()
    }
    return {**functions, "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8)}


def _return(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


class _FakeDriver:
    """The part of a Triton driver that inductor asks while it generates code."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability[0] * 10 + capability[1]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


@functools.cache
def _load_device_guard() -> None:
    """CPU-only builds have no guard for CUDA devices, and refuse fake tensors on them; give them one of no-ops."""
    from torch.utils.cpp_extension import include_paths, library_paths

    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    key = hashlib.sha256(f"{torch.__version__}{torch.__file__}{GUARD_SOURCE}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"compile_moe-tests-{os.getuid()}")
    library = folder / f"device_guard-{key}{suffix}"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as build:
            source, built = Path(build, "guard.cpp"), Path(build, "guard.so")
            source.write_text(GUARD_SOURCE)
            includes = [f"-I{path}" for path in include_paths()]
            links = [*(f"-L{path}" for path in library_paths()), "-lc10"]
            abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
            command = [os.environ.get("CXX", "g++"), "-std=c++17", "-shared", "-fPIC", abi, *includes]
            subprocess.run([*command, str(source), "-o", str(built), *links], check=True)
            # Workers of one test run may build at the same time; the rename is atomic.
            built.rename(library)
    ctypes.CDLL(str(library))


def cuda_empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor for ``make_args``."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def with_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """All parameters of a module in ``dtype``; nn.Module.to can't change those of fake tensors."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    return module
