"""GPUs without float8_e4m3fn are refused, by what they have and what to do; nothing else is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compile_moe.ops.float8_support import no_float8
from compile_moe.ops.quantized_format import check_capability

FP8, GPU = torch.float8_e4m3fn, torch.device("cuda", 0)


@pytest.fixture(params=[(8, 0), (8, 6), (8, 9), (9, 0)], ids=str)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    given: tuple[int, int] = request.param
    return given


def test_float8_needs_a_gpu_that_multiplies_it(capability: tuple[int, int]) -> None:
    reason = no_float8(FP8, GPU)
    assert bool(reason) == (capability < (8, 9))
    if reason:
        for part in ("8.9 or higher", f"Some GPU of {capability[0]}.{capability[1]}", "dequantize_weights"):
            assert part in reason
    assert no_float8(torch.int8, GPU) == no_float8(FP8, torch.device("cpu")) == ""


def test_gemms_name_themselves(capability: tuple[int, int]) -> None:
    weight: Any = SimpleNamespace(dtype=FP8, device=GPU)
    if capability >= (8, 9):
        check_capability("quantized_gather_gemm", weight, "fp8_w8a8_channel()")
        return
    with pytest.raises(
        NotImplementedError, match=r"quantized_gather_gemm: scheme fp8_w8a8_channel\(\): .* 8\.9 "
    ):
        check_capability("quantized_gather_gemm", weight, "fp8_w8a8_channel()")
