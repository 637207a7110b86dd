"""Floats in Triton's interpreter, which stores bfloat16 and float8 as integers and computes in those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def repair_floats(shipped: Any) -> None:
    """Compute bfloat16 in float32 with one rounding, fma with one, and cast as torch does (round to nearest even)."""
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
    shipped_unary, shipped_binary, shipped_ternary = builder.unary_op, builder.binary_op, builder.ternary_op

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

    def unary_op(self: Any, operand: Any, op: Callable[..., Any]) -> Any:
        if not is_bf16(operand):
            return shipped_unary(self, operand, op)
        return narrow(shipped_unary(self, widen(operand), op), tl.bfloat16)

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
        if np.issubdtype(a_data.dtype, np.integer):
            a_data, b_data = a_data.astype(acc.data.dtype), b_data.astype(acc.data.dtype)
        product = np.matmul(a_data, b_data).astype(acc.data.dtype)
        return shipped.TensorHandle(product + acc.data, acc.dtype.scalar)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # float64 has room for products of float32, and makes of two roundings one for nearly all sums.
        x64, y64, z64 = (widen(t).data.astype(np.float64) for t in (x, y, z))
        result = shipped.TensorHandle((x64 * y64 + z64).astype(widen(z).data.dtype), widen(z).dtype.scalar)
        return narrow(result, tl.bfloat16) if is_bf16(z) else result

    def bf16_constant(self: Any, value: float) -> Any:
        exact = shipped.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
        return narrow(exact, tl.bfloat16)

    shipped_sum = shipped.ReduceOps.sum

    def reduce_sum(self: Any, tensor: Any) -> Any:
        if tensor.dtype != tl.bfloat16:
            return shipped_sum(self, tensor)
        total = np.sum(widen(tensor.handle).data, axis=self.axis, keepdims=self.keep_dims)
        rounded = convert(np.asarray(total, np.float32), tl.float32, tl.bfloat16, None)
        return self.to_tensor(rounded, tl.bfloat16)

    shipped._convert_float = convert
    builder.cast_impl = cast_impl
    builder.unary_op = unary_op
    builder.binary_op = binary_op
    builder.ternary_op = ternary_op
    builder.create_dot = dot
    builder.create_fma = fma
    builder.get_bf16 = bf16_constant
    # LLVM's minnum and maxnum return the operand that is a number; only minimum and maximum propagate NaN.
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    shipped.ReduceOps.sum = reduce_sum
