"""The kernels of few rows with the formulas of their schemes, computed on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from compile_moe.ops.kernels.epilogue import build_epilogue
from compile_moe.ops.kernels.quantized.few_rows import launches
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat
from tests.support.formulas_on_cpu import formulas_on_cpu
from tests.support.gluon_on_cpu import DTYPES, KernelOnCpu, Program, Value, copy_rows, on_cpu, view

#: Names and constants, since it was last emptied.
kernels_launched: list[tuple[str, dict[str, Any]]] = []


class _AsyncCopy:
    """Copies that have arrived."""

    @staticmethod
    def commit_group() -> None: ...

    @staticmethod
    def wait_group(pending: Any) -> None: ...


def kernel_with_format(
    kernel: Callable[..., None], weight_format: WeightFormat, epilogue_body: str, names: tuple[str, ...]
) -> KernelOnCpu:
    """For ``with_format`` of these kernels."""
    program = Program()
    formulas = formulas_on_cpu(weight_format, program)
    decode = formulas["decode"]

    def decoded(codes: Value, dtype: Any) -> Value:
        """Of every four those of 0, 2, 1, 3."""
        numbers = decode(codes).data.to(DTYPES[dtype])
        return Value(numbers.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].flatten(-2))

    def decode_words(codes: Value, dtype: Any) -> Any:
        if weight_format.packed == 1:
            return decoded(codes, dtype)
        return decoded(codes & 15, dtype), decoded(codes >> 4, dtype)

    replaced = {
        **formulas,
        "decode_words": decode_words,
        "async_copy": _AsyncCopy,
        "copy_rows": copy_rows,
        "view": view,
    }
    if epilogue_body:
        replaced["epilogue"] = on_cpu(build_epilogue(epilogue_body), program, {})
    return KernelOnCpu(kernel, replaced, kernels_launched)


def few_rows_on_cpu() -> AbstractContextManager[Any]:
    return mock.patch.object(launches, "with_format", kernel_with_format)
