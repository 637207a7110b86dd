"""A quantization scheme as the kernels know it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compile_moe.ops.kernels.quantized.weight_format import WeightFormat
from compile_moe.quantization import parse_scheme


@functools.cache
def weight_format(scheme: str) -> WeightFormat:
    """The format of a scheme's text."""
    parsed = parse_scheme(scheme)
    rows, group = parsed.scale_block
    return WeightFormat(
        parsed.decode, parsed.decode_scale, parsed.packed, parsed.packed_zero_points, rows, group or 0
    )


def check_capability(name: str, w: Tensor, scheme: str) -> None:
    """Raise NotImplementedError where a GPU doesn't multiply the scheme's weights as they are stored."""
    if w.dtype is not torch.float8_e4m3fn or not w.is_cuda:
        return
    capability = torch.cuda.get_device_capability(w.device)
    if capability < (8, 9):
        raise NotImplementedError(
            f"compile_moe::{name}: scheme {scheme} needs a GPU that multiplies float8_e4m3fn, of compute capability "
            f"8.9 or higher, got {torch.cuda.get_device_name(w.device)} of {capability[0]}.{capability[1]}; dequantize "
            "the weights once with compile_moe.dequantize_weights, and pass them without quant_config or scales"
        )
