"""What kernels on decoded weights call, computed on a CPU: formulas of a scheme, products, arithmetic in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compile_moe.ops.kernels.quantized.weight_format import WeightFormat
from tests.support.gluon_on_cpu import Program, Value, mma_v2, on_cpu


def formulas_on_cpu(weight_format: WeightFormat, program: Program) -> dict[str, Callable[..., Any]]:
    """By the names that the kernels call them."""
    decode_scale = on_cpu(weight_format.decode_scale, program, {})

    def decode_scale_16_bits(codes: Value, dtype: Any) -> Value:
        return (decode_scale(codes) if weight_format.powers_of_two else codes).to(dtype)

    def rounded(a: Value, b: Value, compute: Callable[[Any, Any], Any]) -> Value:
        return Value(compute(a.data.double(), b.data.double()).to(a.data.dtype))

    return {
        # Of schemes that quantize tokens there is none.
        "decode": on_cpu(weight_format.decode, program, {}) if weight_format.decode else lambda codes: codes,
        "decode_scale": decode_scale,
        "decode_scale_16_bits": decode_scale_16_bits,
        "times": lambda a, b: rounded(a, b, torch.mul),
        "difference": lambda a, b: rounded(a, b, torch.sub),
        "mma_v2": mma_v2,
        "await_earlier_kernels": lambda early: None,
    }
