"""A quantization scheme as the kernels know it."""

from __future__ import annotations

import functools

from torch import Tensor

from compile_moe.ops.float8_support import no_float8
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat
from compile_moe.quantization import parse_scheme


@functools.cache
def weight_format(scheme: str) -> WeightFormat:
    """The format of a scheme's text."""
    parsed = parse_scheme(scheme)
    rows, group = parsed.scale_block
    return WeightFormat(
        parsed.decode,
        parsed.decode_16_bits,
        parsed.decode_words,
        parsed.decode_registers,
        parsed.decode_pairs,
        parsed.powers_of_two,
        parsed.decode_scale,
        parsed.decode_scale_16_bits,
        parsed.packed,
        parsed.packed_zero_points,
        rows,
        group or 0,
    )


def check_capability(name: str, w: Tensor, scheme: str) -> None:
    """Raise NotImplementedError where a GPU doesn't multiply the scheme's weights as they are stored."""
    if reason := no_float8(w.dtype, w.device):
        raise NotImplementedError(f"compile_moe::{name}: scheme {scheme}: {reason}")
