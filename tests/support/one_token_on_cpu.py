"""The kernels of one token on quantized weights with the formulas of their schemes, computed on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

from compile_moe.ops.kernels.epilogue import build_epilogue
from compile_moe.ops.kernels.quantized.one_token import launches
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat
from compile_moe.quantization.decoding_16_bits import registers_of_signed_bytes
from tests.support.formulas_on_cpu import formulas_on_cpu
from tests.support.gluon_on_cpu import DTYPES, KernelOnCpu, Pointer, Program, Value, on_cpu

#: Names and constants, since it was last emptied.
kernels_launched: list[tuple[str, dict[str, Any]]] = []


def in_words(pointer: Pointer) -> Pointer:
    assert int(pointer.offsets) % 4 == 0, "words start at a multiple of four bytes"
    memory = pointer.memory[: pointer.memory.numel() // 4 * 4]
    return Pointer(memory.view(torch.int32).long() & 0xFFFFFFFF, pointer.offsets // 4)


def kernel_with_format(
    kernel: Callable[..., None], weight_format: WeightFormat, epilogue_body: str
) -> KernelOnCpu:
    """For ``with_format`` of these kernels."""
    program = Program()
    int8 = weight_format.decode_registers is registers_of_signed_bytes
    formulas = formulas_on_cpu(weight_format, program)
    decode = formulas["decode"]

    def number(byte: torch.Tensor, dtype: Any) -> torch.Tensor:
        if weight_format.decode is not None:
            return decode(Value(byte)).data.to(DTYPES[dtype])
        stored = torch.int8 if int8 else torch.float8_e4m3fn
        return byte.to(torch.uint8).view(stored).float().to(DTYPES[dtype])

    def decode_registers(words: Value, dtype: Any) -> tuple[Value, ...]:
        word, same = words.data.unbind(-1)
        assert torch.equal(word, same), "each word is given twice"
        stored = [word >> 8 * i & 255 for i in range(4)]
        codes = [stored]
        if weight_format.packed == 2:
            codes = [[byte & 15 for byte in stored], [byte >> 4 for byte in stored]]
        numbers = [[number(byte, dtype) for byte in each] for each in codes]
        return tuple(Value(torch.stack([each[i], each[i + 2]], -1)) for each in numbers for i in range(2))

    replaced = {
        **formulas,
        "decode_registers": decode_registers,
        "in_words": in_words,
    }
    if epilogue_body:
        replaced["epilogue"] = on_cpu(build_epilogue(epilogue_body), program, {})
    return KernelOnCpu(kernel, replaced, kernels_launched)


def one_token_on_cpu() -> AbstractContextManager[Any]:
    return mock.patch.object(launches, "with_format", kernel_with_format)
