"""Run Triton kernels on CPU tensors: repairs of Triton's interpreter, and processes to run it in.

As shipped (triton 3.6) the interpreter computes in the integers that store bfloat16, truncates casts, knows no
libdevice, and reads out of bounds silently. ``repair()`` mends that. The switch TRITON_INTERPRET is read when a
kernel is decorated, so interpreted tests live in ``tests/interpreted`` and run in processes of their own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]


def is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(test_file: Path, *pytest_arguments: str, timeout: float = 600) -> None:
    """Run one test file under the interpreter, and fail with its output if it fails."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(test_file),
    ]
    result = subprocess.run(
        [*command, *pytest_arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if result.returncode != 0:
        raise AssertionError(f"{test_file.name} under the interpreter:\n{result.stdout}\n{result.stderr}")


@functools.cache
def repair() -> None:
    """Mend the interpreter of this process. Call it before the first launch."""
    if not is_interpreting():
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported; see run_interpreted")
    import triton.runtime.interpreter as shipped

    _repair_floats(shipped)
    _repair_scalars(shipped)
    _check_bounds(shipped)
    _add_libdevice(shipped)


def _repair_floats(shipped: Any) -> None:
    """Compute bfloat16 in float32 with one rounding, and cast as torch does (round to nearest even)."""
    import triton.language as tl

    builder = shipped.InterpreterBuilder
    torch_types = {
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
        tl.float64: torch.float64,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    storage = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    shipped_convert, shipped_cast = shipped._convert_float, builder.cast_impl
    shipped_binary, shipped_ternary = builder.binary_op, builder.ternary_op

    def as_torch(data: np.ndarray, dtype: Any) -> torch.Tensor:
        bits = np.array(data, order="C", ndmin=1).view(storage[torch_types[dtype].itemsize])
        return torch.from_numpy(bits).view(torch_types[dtype]).reshape(np.shape(data))

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source not in torch_types or target not in torch_types:
            return shipped_convert(data, source, target, rounding)
        unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
        result = as_torch(data, source).to(torch_types[target])
        return result.reshape(-1).view(unsigned[result.itemsize]).numpy().reshape(np.shape(data))

    def widen(handle: Any) -> Any:
        """The same values in a type that numpy can compute in."""
        if handle.dtype.scalar == tl.bfloat16 or handle.dtype.scalar.is_fp8():
            data = convert(handle.data, handle.dtype.scalar, tl.float32, None).view(np.float32)
            return shipped.TensorHandle(data, tl.float32)
        return handle

    def narrow(handle: Any, dtype: Any) -> Any:
        if handle.data.dtype != np.float32:  # a comparison's truth values
            return shipped.TensorHandle(handle.data, dtype)
        return shipped.TensorHandle(convert(handle.data, tl.float32, dtype, None), dtype)

    def is_bf16(*handles: Any) -> bool:
        return any(h.dtype.scalar == tl.bfloat16 for h in handles)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if not is_bf16(source) and target.scalar != tl.bfloat16:
            return shipped_cast(self, source, target)
        if target.scalar == tl.bfloat16:
            exact = shipped_cast(self, widen(source), tl.float32)
            return narrow(exact, tl.bfloat16)
        return shipped_cast(self, widen(source), target)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if not is_bf16(lhs, rhs):
            return shipped_binary(self, lhs, rhs, op)
        return narrow(shipped_binary(self, widen(lhs), widen(rhs), op), tl.bfloat16)

    def ternary_op(self: Any, first: Any, second: Any, third: Any, op: Callable[..., Any]) -> Any:
        if op is np.where or not is_bf16(first, second, third):
            return shipped_ternary(self, first, second, third, op)
        return narrow(shipped_ternary(self, widen(first), widen(second), widen(third), op), tl.bfloat16)

    def dot(self: Any, a: Any, b: Any, acc: Any, *precision: Any) -> Any:
        # Products of narrow floats are exact in float32, which is also what tensor cores add up.
        a_data, b_data = (
            h.data.astype(np.float32) if h.dtype.scalar == tl.float16 else widen(h).data for h in (a, b)
        )
        product = np.matmul(a_data, b_data).astype(acc.data.dtype)
        return shipped.TensorHandle(product + acc.data, acc.dtype.scalar)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        result = shipped.TensorHandle(widen(x).data * widen(y).data + widen(z).data, widen(z).dtype.scalar)
        return narrow(result, tl.bfloat16) if is_bf16(z) else result

    def bf16_constant(self: Any, value: float) -> Any:
        return cast_impl(
            self, shipped.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.bfloat16
        )

    shipped_sum = shipped.ReduceOps.sum

    def reduce_sum(self: Any, tensor: Any) -> Any:
        if tensor.dtype != tl.bfloat16:
            return shipped_sum(self, tensor)
        total = np.sum(widen(tensor.handle).data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(
            convert(np.asarray(total, np.float32), tl.float32, tl.bfloat16, None), tl.bfloat16
        )

    shipped._convert_float = convert
    builder.cast_impl = cast_impl
    builder.binary_op = binary_op
    builder.ternary_op = ternary_op
    builder.create_dot = dot
    builder.create_fma = fma
    builder.get_bf16 = bf16_constant
    # LLVM's minnum and maxnum return the operand that is a number; only minimum and maximum propagate NaN.
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    shipped.ReduceOps.sum = reduce_sum


def _repair_scalars(shipped: Any) -> None:
    """Scalars are arrays of one element to the interpreter, which numpy no longer turns into an index."""
    shipped_patch = shipped._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        shipped_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    shipped._patch_lang_tensor = patch_tensor


def _check_bounds(shipped: Any) -> None:
    """Raise where a kernel touches memory outside the storages of its arguments."""
    builder, executor = shipped.InterpreterBuilder, shipped.GridExecutor
    shipped_load, shipped_store = builder.create_masked_load, builder.create_masked_store
    shipped_atomic, shipped_call = builder.create_atomic_rmw, executor.__call__
    shipped_init = executor._init_args_hst
    allowed: list[tuple[np.ndarray, np.ndarray]] = []

    def check(pointers: Any, mask: Any, action: str) -> None:
        if not allowed:
            return
        starts, ends = allowed[-1]
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[active]
        if addresses.size == 0:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if starts.size:
            nearest = np.searchsorted(starts, addresses, side="right")
            outside = (nearest == 0) | (addresses + np.uint64(width) > ends[nearest - 1])
        else:
            outside = np.ones(addresses.shape, dtype=bool)
        if outside.any():
            raise IndexError(
                f"{action} outside every argument: {int(outside.sum())} of {addresses.size} active addresses, "
                f"the first in lane {tuple(int(i) for i in np.argwhere(active)[outside.argmax()])}"
            )

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(pointers, mask, "load")
        return shipped_load(self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "store")
        return shipped_store(self, pointers, value, mask, *rest)

    def atomic(self: Any, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointer, mask, "atomic")
        return shipped_atomic(self, op, pointer, value, mask, *rest)

    def init_arguments(self: Any, arguments: Any, named: Any) -> Any:
        host = shipped_init(self, arguments, named)
        tensors = list(_tensors_in(host))
        spans = sorted(
            {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)}
        )
        allowed[-1] = tuple(np.array(edge, dtype=np.uint64) for edge in zip(*spans, strict=True)) or (
            np.empty(0, np.uint64),
            np.empty(0, np.uint64),
        )
        return host

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        allowed.append((np.empty(0, np.uint64), np.empty(0, np.uint64)))
        try:
            # Lanes that a mask discards may overflow or divide by zero, as they may on a GPU.
            with np.errstate(all="ignore"):
                return shipped_call(self, *arguments, **named)
        finally:
            allowed.pop()

    builder.create_masked_load = load
    builder.create_masked_store = store
    builder.create_atomic_rmw = atomic
    executor._init_args_hst = init_arguments
    executor.__call__ = call


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif hasattr(value, "base"):  # a tensor descriptor or a reinterpreted tensor
        yield from _tensors_in(value.base)


def _add_libdevice(shipped: Any) -> None:
    """Elementwise functions of libdevice through torch's functions of the same name."""
    import triton.language.extra.cuda.libdevice as cuda_libdevice
    import triton.language.extra.libdevice as libdevice

    # Where torch has no function of that name, or one that means something else.
    own: dict[str, Callable[..., torch.Tensor]] = {
        "fabs": torch.abs,
        "rint": torch.round,
        "nearbyint": torch.round,
        "round": lambda x: torch.trunc(x + torch.copysign(torch.full_like(x, 0.5), x)),
        "remainder": lambda x, y: x - y * torch.round(x / y),
        "fma": lambda x, y, z: (x.double() * y.double() + z.double()).to(x.dtype),
        "powi": torch.pow,
        "fdivide": torch.true_divide,
        "div_rn": torch.true_divide,
        "sqrt_rn": torch.sqrt,
        "rcp_rn": torch.reciprocal,
        "exp10": lambda x: torch.pow(10.0, x),
        "saturate": lambda x: torch.clamp(x, 0.0, 1.0),
    }

    def function_of(symbol: str) -> Callable[..., torch.Tensor]:
        name = symbol.removeprefix("__nv_").removeprefix("fast_")
        # The type is a letter at either end: __nv_tanhf, __nv_fdiv_rn, __nv_ddiv_rn.
        for spelling in (name, name.removesuffix("f"), name[1:]):
            found = own.get(spelling) or getattr(torch, spelling, None)
            if found is not None:
                return found
        raise NotImplementedError(f"{symbol} has no counterpart here: add one to _add_libdevice")

    def extern_elementwise(
        self: Any, library: str, path: str, symbol: str, handles: list[Any], result_type: Any, is_pure: bool
    ) -> Any:
        operands = [torch.from_numpy(np.array(h.data, order="C")) for h in handles]
        result = function_of(symbol)(*operands).numpy()
        scalar = result_type.scalar
        return shipped.TensorHandle(result.astype(shipped._get_np_dtype(scalar)), scalar)

    shipped.InterpreterBuilder.create_extern_elementwise = extern_elementwise

    def interpreted(member: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(member)
        def call(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = shipped.interpreter_semantic
            return member(*arguments, **named)

        return call

    # The compiler replaces the stubs of the portable module by those of the backend; the interpreter doesn't.
    for name, member in list(vars(cuda_libdevice).items()):
        if callable(member) and getattr(member, "__triton_builtin__", False):
            wrapped = interpreted(member)
            setattr(cuda_libdevice, name, wrapped)
            setattr(libdevice, name, wrapped)
