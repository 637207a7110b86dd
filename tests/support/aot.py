"""Compile a Triton kernel for a GPU that this machine need not have, and read what it costs there."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Shared memory that one block may have, in bytes, by compute capability (sm_89 and sm_86 have what sm_120 has).
SHARED_MEMORY_BUDGET = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CAPABILITIES = tuple(SHARED_MEMORY_BUDGET)

_TYPE_NAMES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


Argument = Tensor | TensorDescriptor | int | float | str | None


class CompiledKernel(NamedTuple):
    """What one specialization of a kernel uses on one architecture; sizes in bytes."""

    capability: int
    registers: int  # a thread
    spill_stores: int  # a thread
    spill_loads: int
    stack: int
    shared: int  # a block, allocated at launch
    has_wgmma: bool  # Hopper's asynchronous tensor-core instruction
    has_tcgen05: bool  # Blackwell's
    ptx: str

    @property
    def may_overwrite_operands(self) -> bool:
        """Whether products, once issued, aren't awaited while they read an operand from registers."""
        from_registers = re.search(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*\{", self.ptx) is not None
        return from_registers and re.search(r"wgmma\.wait_group\S* [1-9]", self.ptx) is not None

    @property
    def fits(self) -> bool:
        """Whether a block's shared memory stays within what the architecture offers."""
        return self.shared <= SHARED_MEMORY_BUDGET[self.capability]


def compile_ahead(
    kernel: Any,
    arguments: Sequence[Argument] | Mapping[str, Argument],
    constants: Mapping[str, Any] | None = None,
    *,
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> CompiledKernel:
    """Compile ``kernel`` as a launch with these arguments would.

    Args:
        kernel: a function decorated with ``@triton.jit`` or ``@gluon.jit``.
        arguments: the launch's arguments, in order or by name. A tensor stands for a 16-byte aligned pointer and
            may be on the meta device; a string is a Triton type ("*bf16", "i32") for a value that nothing is
            known of. Integers are specialized on == 1 and on divisibility by 16 as in a launch, unless the
            kernel forbids it (``do_not_specialize``).
        constants: values of the ``tl.constexpr`` parameters.
        capability: 80, 90, 100 or 120.
    """
    parameters = {p.name: p for p in kernel.params}
    if not isinstance(arguments, Mapping):
        names = [p.name for p in kernel.params if not p.is_constexpr]
        if len(arguments) > len(names):
            raise TypeError(f"{kernel.__name__} takes {names}, got {len(arguments)} arguments")
        arguments = dict(zip(names, arguments, strict=False))
    constexprs = {k: v for k, v in (constants or {}).items() if k in parameters}
    defaults = {p.name: p.default for p in kernel.params if p.has_default}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name not in arguments:
            if name not in constexprs:
                if name not in defaults:
                    raise TypeError(f"{kernel.__name__} needs a value for {name!r}")
                constexprs[name] = defaults[name]
            signature[name] = "constexpr"
            continue
        value = arguments[name]
        specialize = not parameters[name].do_not_specialize
        if value is None or (specialize and type(value) is int and value == 1):
            signature[name], constexprs[name] = "constexpr", value
            continue
        signature[name] = _type_name(value)
        aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if specialize and aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    with _up_to_ptx():
        compiled = triton.compile(
            source(
                kernel,
                signature,
                {(kernel.arg_names.index(k),): v for k, v in constexprs.items()},
                attributes,
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages, **options},
        )
    ptx = compiled.asm["ptx"]
    return CompiledKernel(
        capability,
        **_resources(ptx, capability),
        shared=compiled.metadata.shared,
        has_wgmma="wgmma.mma_async" in ptx,
        has_tcgen05="tcgen05.mma" in ptx,
        ptx=ptx,
    )


@contextlib.contextmanager
def _up_to_ptx() -> Iterator[None]:
    """Triton doesn't assemble, which :func:`_resources` does; so its results have a cache of their own."""
    with triton.knobs.cache.scope(), mock.patch.object(CUDABackend, "make_cubin", lambda *arguments: b""):
        triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir, "compile_moe_tests_without_cubins"))
        yield


def _type_name(value: Tensor | TensorDescriptor | int | float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPE_NAMES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
    if isinstance(value, Tensor):
        return f"*{_TYPE_NAMES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(ptx: str, capability: int) -> dict[str, int]:
    """What the assembler reports; the kernel's metadata has neither registers nor spills before it is loaded."""
    ptxas = get_ptxas(capability).path
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None, "PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            ptxas,
            "-v",
            f"--gpu-name={target[1]}",
            str(source),
            "-o",
            str(source.with_suffix(".cubin")),
        ]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    return {name: max(map(int, re.findall(pattern, log))) for name, pattern in found.items()}
