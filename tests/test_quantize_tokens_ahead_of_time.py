"""The kernels of quantize_tokens compile for every architecture that has their dtype, without spills."""

from __future__ import annotations

import pytest
import torch

from compile_moe.ops.kernels import quantize_per_tensor, quantize_tokens
from compile_moe.ops.kernels.launch import Launch
from tests.support.aot import CAPABILITIES
from tests.test_kernels_ahead_of_time import compile_launch, empty

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
#: K, and columns that share a scale.
SHARES = [(2048, 128), (2048, 2048), (16384, 16384), (77, 77), (2880, 128)]


def compile_quantization(launch: Launch, capability: int, vectorized: bool) -> None:
    compiled = compile_launch(launch, capability)
    assert "div.rn.f32" in compiled.ptx and "div.full" not in compiled.ptx
    if vectorized:
        assert "ld.global.v4" in compiled.ptx and "st.global.v4" in compiled.ptx


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_quantize_tokens(capability: int, dtype: torch.dtype) -> None:
    if capability == 80 and dtype is torch.float8_e4m3fn:
        pytest.skip("Triton has no float8_e4m3fn there; the op says so")
    largest, floats = LARGEST[dtype], {"dtype": torch.float32}
    for k, width in SHARES if capability == 90 else SHARES[:1]:
        tokens, quantized = empty(64, k, dtype=torch.bfloat16), empty(64, k, dtype=dtype)
        scales = empty(64, -(-k // width), **floats)
        for offsets in (None, empty(9)):
            launch = quantize_tokens.launch_for(quantized, scales, tokens, offsets, width, largest)
            compile_quantization(launch, capability, k % 128 == 0)
    tokens, quantized = empty(64, 2048, dtype=torch.bfloat16), empty(64, 2048, dtype=dtype)
    one, each, many = empty(1, **floats), empty(64, 1, **floats), empty(5000, **floats)
    for offsets in (None, empty(9)):
        compile_launch(quantize_per_tensor.launch_of_maxima(many, tokens, offsets), capability)
    compile_launch(quantize_per_tensor.launch_of_fewer(one, many), capability)
    for given, scales, number in ((one, one, None), (each, each, None), (many, one, 300)):
        for offsets in (None, empty(9)):
            launch = quantize_per_tensor.launch_for(
                quantized, scales, tokens, given, number, offsets, largest
            )
            compile_quantization(launch, capability, True)
