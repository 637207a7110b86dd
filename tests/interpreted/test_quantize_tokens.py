"""The kernels of quantize_tokens, interpreted: the bits of the CPU implementation."""

from __future__ import annotations

import pytest
import torch

from compile_moe.ops import quantize_tokens
from compile_moe.ops.kernels import quantize_per_tensor
from compile_moe.ops.kernels import quantize_tokens as quantize_shares
from tests.support.launchers import launch
from tests.support.token_inputs import GIVEN, SCALINGS, assert_same_bits, given, heavy_tailed

SHAPES = [(0, 5), (1, 1), (1, 300), (5, 130), (17, 33)]


# 16-bit tokens, which programs compute with in float32, by both kinds of kernels.
@pytest.mark.parametrize(
    ("scaling", "dtype"),
    [
        *((scaling, torch.float32) for scaling in SCALINGS),
        *(("int8 per tensor", dtype) for dtype in (torch.bfloat16, torch.float16)),
        *(("float8_e4m3fn per group of 7", dtype) for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_bits(scaling: str, dtype: torch.dtype) -> None:
    for m, k in SHAPES:
        for special in (False, True):
            x = heavy_tailed(m, k, dtype, special)
            assert_same_bits(launch(quantize_tokens, x, scaling), quantize_tokens(x, scaling))


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_given(dtype: str, kind: str) -> None:
    scaling = f"{dtype} per tensor"
    for m, k in SHAPES:
        x = heavy_tailed(m, k, torch.bfloat16)
        arguments = x, scaling, *given(kind, x)
        assert_same_bits(launch(quantize_tokens, *arguments), quantize_tokens(*arguments))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_strides(scaling: str) -> None:
    x = heavy_tailed(40, 6, torch.float32)
    views = x.t(), x[::3, 1::2], x[:0], x[5].expand(3, 6)
    for view in views:
        assert_same_bits(launch(quantize_tokens, view, scaling), quantize_tokens(view, scaling))
    scale = torch.rand(12)[::2].unsqueeze(1)
    if scaling.endswith("tensor"):
        for arguments in ((x.t(), scaling, scale), (x.t(), scaling, None, torch.rand(12)[::2])):
            assert_same_bits(launch(quantize_tokens, *arguments), quantize_tokens(*arguments))


@pytest.mark.parametrize("scaling", ["int8 per token", "float8_e4m3fn per group of 100"])
def test_a_share_of_several_blocks(scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a row of more than 8192."""
    monkeypatch.setattr(quantize_shares, "MOST_HELD", 32)
    for special in (False, True):
        x = heavy_tailed(5, 230, torch.float32, special)
        assert_same_bits(launch(quantize_tokens, x, scaling), quantize_tokens(x, scaling))


def test_maxima_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs take several rows and blocks."""
    monkeypatch.setattr(quantize_per_tensor, "BLOCK", 16)
    for parts in (1, 3, 8):
        monkeypatch.setattr(quantize_per_tensor, "MOST_PARTS", parts)
        monkeypatch.setattr(quantize_per_tensor, "MOST_PROGRAMS", 5 * parts)
        for special in (False, True):
            x = heavy_tailed(7, 77, torch.float32, special)
            assert_same_bits(
                launch(quantize_tokens, x, "int8 per tensor"), quantize_tokens(x, "int8 per tensor")
            )


@pytest.mark.parametrize(
    ("num_rows", "programs"), [*((n, 2) for n in (0, 1, 5, 9, 10**6, -3)), (5, 1024), (10**6, 1024)]
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rows_behind_the_last_expert(
    scaling: str, num_rows: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They don't count, whatever they hold, and aren't written."""
    for module in (quantize_per_tensor, quantize_shares):
        monkeypatch.setattr(module, "MOST_PROGRAMS", programs)
    x = torch.randn(9, 130)
    count = min(max(num_rows, 0), 9)
    x[count:] = torch.nan
    offsets = torch.tensor([0, 1, num_rows], dtype=torch.int32)
    scales: list[torch.Tensor | None] = [None]
    if scaling.endswith("tensor"):
        scales += [torch.rand(1), torch.rand(9, 1)]
    for scale in scales:
        quantized, found = launch(quantize_tokens, x, scaling, scale, None, offsets)
        given = None if scale is None else scale if scale.dim() == 1 else scale[:count]
        expected, scales_of_rows = quantize_tokens(x[:count], scaling, given)
        each = found.dim() == 2
        assert_same_bits((quantized[:count], found[:count] if each else found), (expected, scales_of_rows))
        unwritten = quantized[count:].float()
        assert (unwritten.isnan() | (unwritten == -128)).all()
        assert not each or found[count:].isnan().all()
        on_cpu = quantize_tokens(x, scaling, scale, None, offsets)
        assert_same_bits(
            (on_cpu[0][:count], on_cpu[1][:count] if each else on_cpu[1]), (expected, scales_of_rows)
        )
