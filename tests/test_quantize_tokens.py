"""quantize_tokens: its lowering against the op, the devices it refuses, and its kernels on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compile_moe.ops import quantize_tokens
from tests.support.profiled import on_gpu
from tests.support.quantized_inputs import opcheck
from tests.support.token_inputs import GIVEN, SCALINGS, assert_same_bits, given, heavy_tailed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PER_TENSOR = [scaling for scaling in SCALINGS if scaling.endswith("tensor")]


@pytest.mark.parametrize("scaling", PER_TENSOR)
def test_maxima(scaling: str) -> None:
    """Whoever knows the largest magnitude gets what the op finds."""
    x = heavy_tailed(5, 24, torch.float32, special=False)
    for maxima in (x.abs().amax(1), x.abs().amax().reshape(1)):
        opcheck(quantize_tokens, (x, scaling, None, maxima))
        assert_same_bits(quantize_tokens(x, scaling, None, maxima), quantize_tokens(x, scaling))
    _, scale = quantize_tokens(x[:0], scaling, None, x.new_empty(0))
    assert scale.tolist() == [2.0**-126]


@pytest.mark.parametrize(
    ("scaling", "scale", "maxima", "message"),
    [
        ("int8 per token", None, torch.ones(3), "with scaling int8 per token they must be None"),
        ("int8 per tensor", torch.ones(1), torch.ones(3), "and a given scale they must be None"),
        ("int8 per tensor", None, torch.ones(3, 1), r"one dimension, got \(3, 1\)"),
        ("int8 per tensor", None, torch.ones(3).double(), "maxima must be float32, got torch.float64"),
    ],
)
def test_bad_maxima(scaling: str, scale: Tensor | None, maxima: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        quantize_tokens(torch.ones(3, 4), scaling, scale, maxima)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rows_in_expert_order(scaling: str) -> None:
    x = heavy_tailed(9, 24, torch.float32, special=False)
    opcheck(quantize_tokens, (x, scaling, None, None, torch.tensor([0, 2, 5], dtype=torch.int32)))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.zeros(1, 3).int(), r"expert_offsets must be \(E \+ 1,\), got \(1, 3\)"),
        (torch.zeros(0).int(), r"expert_offsets must be \(E \+ 1,\), got \(0,\)"),
        (torch.zeros(3), "expert_offsets must be int32, got torch.float32"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), "expert_offsets must be on the device of tokens"),
    ],
)
def test_bad_expert_offsets(offsets: Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        quantize_tokens(torch.ones(3, 4), "int8 per token", None, None, offsets)


def test_expert_offsets_and_maxima() -> None:
    with pytest.raises(ValueError, match=r"not all rows count: maxima must be None, .*got \(3,\)"):
        quantize_tokens(
            torch.ones(3, 4), "int8 per tensor", None, torch.ones(3), torch.zeros(2, dtype=torch.int32)
        )


def doubled(x: Tensor, scaling: str, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """With a neighbour that rounds nothing."""
    return quantize_tokens(x * 2, scaling, *given)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled(scaling: str, device: str) -> None:
    """The op's bits, for any shape and dtype. Columns of 112 have whole groups of 7, and 256 have those of 128."""
    compiled = torch.compile(doubled, fullgraph=True, dynamic=True)
    shapes = ((5, 112), (17, 112), (5, 256), (1, 112), (0, 112))
    for dtype in (torch.float32, torch.bfloat16):
        # Each dtype compiles anew, and so do one row and none; on a CPU that takes seconds.
        most = 2 if dtype is torch.bfloat16 else 3 if "float8" in scaling else 5
        for m, k in shapes[:most] if device == "cpu" else shapes:
            x = heavy_tailed(m, k, dtype, device=device)
            assert_same_bits(compiled(x, scaling), doubled(x, scaling))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled_long_rows(scaling: str, dtype: torch.dtype) -> None:
    """Reductions in loops, and of few rows in parts; NaN of both signs."""
    compiled = torch.compile(doubled, fullgraph=True)
    for m, k in ((9, 4096), (2, 16384), (1, 65536)):
        for special in (False, True):
            x = heavy_tailed(m, k, dtype, special, device="cuda")
            assert_same_bits(compiled(x, scaling), doubled(x, scaling))
            assert_same_bits(compiled(-x, scaling), doubled(-x, scaling))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled_behind_what_is_rounded(scaling: str, device: str) -> None:
    """The scale may come of exact sums, here 3, and what it divides of rounded ones, 4: it is clamped; or both of one
    kind, or the other way round.
    """

    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        h = a + b
        return h, *quantize_tokens(h - c, scaling)

    a, b, c = (torch.full((4, 4096), x, dtype=torch.bfloat16, device=device) for x in (1000.0, 3.0, 1000.0))
    _, quantized, scales = torch.compile(function, fullgraph=True)(a, b, c)
    largest = 127 if quantized.dtype is torch.int8 else 448
    assert (quantized.float() >= 0.7 * largest).all() and (quantized.float() <= largest).all()
    assert ((scales * largest - 3.5).abs() < 0.51).all()
    # Infinite where it is stored, by a scale that may be finite.
    a = b = torch.full((4, 4096), 35000.0, dtype=torch.float16, device=device)
    _, quantized, scales = torch.compile(function, fullgraph=True)(a, b, torch.zeros_like(a))
    assert scales.isinf().all() or (quantized.float() == largest).all()


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("scaling", PER_TENSOR)
def test_compiled_given(scaling: str, kind: str, device: str) -> None:
    compiled = torch.compile(doubled, fullgraph=True, dynamic=True)
    for m, k in ((5, 96), (17, 96), (1, 96), (0, 96)):
        x = heavy_tailed(m, k, torch.bfloat16, device=device)
        arguments = x, scaling, *given(kind, x)
        assert_same_bits(compiled(*arguments), doubled(*arguments))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled_strides(scaling: str, device: str) -> None:
    x = heavy_tailed(56, 7, torch.float32, device=device)
    compiled = torch.compile(doubled, fullgraph=True)
    views = (x.t(), x[::3, 1::2], x.double().t())
    for view in views[2:] if device == "cpu" and "float8" in scaling else views:
        if view.dtype is not torch.float64 or device == "cpu":
            assert_same_bits(compiled(view, scaling), doubled(view, scaling))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 96, 130, 2048])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_kernel(scaling: str, k: int) -> None:
    """The CPU's bits."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if k == 130 else (torch.bfloat16,):
        for m in (0, 1, 17, 300):
            for special in (False, True):
                x = heavy_tailed(m, k, dtype, special)
                assert_same_bits(quantize_tokens(x.cuda(), scaling), quantize_tokens(x, scaling))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("scaling", PER_TENSOR)
def test_kernel_given(scaling: str, kind: str) -> None:
    for m in (0, 1, 17, 300):
        for k in (1, 130, 2048):
            x = heavy_tailed(m, k, torch.bfloat16)
            arguments = given(kind, x)
            on_cuda = [t if t is None else t.cuda() for t in arguments]
            assert_same_bits(
                quantize_tokens(x.cuda(), scaling, *on_cuda), quantize_tokens(x, scaling, *arguments)
            )


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
def test_kernel_strides_and_long_rows(scaling: str) -> None:
    x = heavy_tailed(400, 300, torch.bfloat16)
    # An address that is no multiple of 16 bytes, and rows in two parts.
    for view in (x.t(), x[::3, 1::2], x[1:, 1:], heavy_tailed(6, 20000, torch.bfloat16)):
        on_cuda = view.untyped_storage().cuda()
        strided = torch.empty(0, dtype=view.dtype, device="cuda").set_(
            on_cuda, view.storage_offset(), view.shape, view.stride()
        )
        assert_same_bits(quantize_tokens(strided, scaling), quantize_tokens(view, scaling))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 17, 300, 3000])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_capture_replays_with_other_tokens(scaling: str, m: int) -> None:
    """Whatever number of tokens was quantized before."""
    quantize_tokens(heavy_tailed(33, 256, torch.bfloat16, device="cuda"), scaling)
    x = torch.ones(m, 256, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantized, scales = quantize_tokens(x, scaling)
    for special in (False, True, False):
        x.copy_(heavy_tailed(m, 256, torch.bfloat16, special))
        scales.fill_(torch.nan)
        graph.replay()
        assert_same_bits((quantized, scales), quantize_tokens(x.cpu(), scaling))


#: Kernels of an RMSNorm and the quantization of its result.
KERNELS = {
    "float8_e4m3fn per tensor": 2,
    "float8_e4m3fn per token": 1,
    "float8_e4m3fn per group of 128": 2,
    "int8 per token": 1,
    "static": 1,
}


def norm_and_quantization(
    x: Tensor, weight: Tensor, scale: Tensor | None, scaling: str
) -> tuple[Tensor, ...]:
    h = F.rms_norm(x, weight.shape, weight, 1e-6)
    quantized, scales = quantize_tokens(h, scaling, scale)
    return (h, quantized, scales) if scale is None else (h, quantized)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("m", [1, 16, 300])
@pytest.mark.parametrize("case", KERNELS)
def test_kernels_of_norm_and_quantization(case: str, m: int, mode: str | None) -> None:
    """As the profiler counts them, and what they compute, in replays, too."""
    compiled: Any = torch.compile(norm_and_quantization, fullgraph=True, mode=mode)
    weight = 1 + 0.1 * torch.randn(2048, device="cuda", dtype=torch.bfloat16)
    given = torch.tensor([0.01], device="cuda") if case == "static" else None
    scaling = "float8_e4m3fn per tensor" if case == "static" else case
    for _ in range(4):
        x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        _, quantized, *scales = (t.clone() for t in compiled(x, weight, given, scaling))
        scale = scales[0] if given is None else given
        back = quantized.float() * (scale.repeat_interleave(128, 1) if "group" in case else scale)
        exact = F.rms_norm(x.double(), (2048,), weight.double(), 1e-6)
        assert (back - exact).norm() <= (0.04 if "float8" in scaling else 0.02) * exact.norm()
    if mode is None:
        names = on_gpu(lambda: compiled(x, weight, given, scaling))
        # With one token, one scale for all is that of the token.
        assert len(names) == (1 if m == 1 and case.endswith("tensor") else KERNELS[case]), names
