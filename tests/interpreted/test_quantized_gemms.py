"""The kernels of quantized GEMMs, interpreted: every scheme against float64, hostile layers, bounds, special values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe.ops import quantized_gather_gemm, quantized_scatter_gemm
from compile_moe.ops.kernels.quantized import tiles
from compile_moe.ops.named_activations import NAMES
from tests.support.launchers import launch
from tests.support.oracle import CASES
from tests.support.quantized import VARIANTS, Variant, make_quantized
from tests.support.quantized_gemms import DEFAULTS, GEMMS, Gemms, spread

#: Quantized tokens with scales of blocks, and packed weights with zero points.
TWO = ("fp8_w8a8_block-block_shape(16,24)", "int4_w4a16-group_size16-zp")

OPS = {"quantized_gather_gemm": quantized_gather_gemm, "quantized_scatter_gemm": quantized_scatter_gemm}

#: Group and block sizes that divide no tile, or that no tile divides.
AWKWARD = {
    "int4-24-zp": Variant("int4_w4a16", (("group_size", 24),), True),
    "int4-2": Variant("int4_w4a16", (("group_size", 2),)),
    "int8-7-zp": Variant("int8_w8a16", (("group_size", 7),), True),
    "int8-1": Variant("int8_w8a16", (("group_size", 1),)),
    "int8-96": Variant("int8_w8a16", (("group_size", 96),)),
    "fp8-3x40": Variant("fp8_w8a8_block", (("block_shape", (3, 40)),)),
    "fp8-1x1": Variant("fp8_w8a8_block", (("block_shape", (1, 1)),)),
    "fp8-64x48": Variant("fp8_w8a8_block", (("block_shape", (64, 48)),)),
    "fp8-200x200": Variant("fp8_w8a8_block", (("block_shape", (200, 200)),)),
    "fp8-256x256": Variant("fp8_w8a8_block", (("block_shape", (256, 256)),)),
}


def run(gemms: Gemms, stage: str) -> Tensor:
    result: Tensor = launch(OPS[stage], *gemms.inputs[stage])
    return result


def check(variant: Variant, **options: Any) -> None:
    gemms = Gemms(make_quantized(variant, **options))
    for stage in GEMMS:
        gemms.check(stage, run(gemms, stage))


def gemm_cases() -> list[Any]:
    """Every scheme over masked tiles and with biases; rows, which no scheme looks at, with two."""
    rows = [(v, c) for v in TWO for c in ("M0", "M1", "skipped")]
    return [*((v, c) for v in VARIANTS for c in ("odd", "mapped-int32-biased")), *rows]


@pytest.mark.parametrize(("variant", "case"), gemm_cases())
def test_gemms(variant: str, case: str) -> None:
    check(VARIANTS[variant], **CASES[case] | {"E": 3})


# float32, which all other tests have, where tokens are quantized and where they aren't.
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((v, torch.bfloat16) for v in DEFAULTS),
        *((v, torch.float32) for v in ("fp8_w8a8_block-default", "mxfp4_w4a16-default")),
    ],
    ids=str,
)
def test_steps_along_k(variant: str, dtype: torch.dtype) -> None:
    """Several steps of the loop, the last one cut off where the scheme allows it."""
    check(DEFAULTS[variant], M=3, E=2, K=290, I=150, biased=True, dtype=dtype)


@pytest.mark.parametrize("variant", AWKWARD)
def test_sizes_that_fit_no_tile(variant: str) -> None:
    check(AWKWARD[variant], M=2, E=1, topk=1, K=70, I=40)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *(("fp8_w8a8_channel", name) for name in NAMES),
        *(("int4_w4a16-group_size16-zp", name) for name in ("silu", "swigluoai", "relu2_no_mul")),
    ],
)
def test_activation_in_the_epilogue(variant: str, name: str) -> None:
    check(VARIANTS[variant], M=5, I=33, activation=name, biased=True)


def test_without_an_epilogue() -> None:
    gemms = Gemms(make_quantized(VARIANTS["mxfp4_w4a16"], biased=True))
    arguments = gemms.inputs[GEMMS[0]][:-2]
    expected = quantized_gather_gemm(*arguments)
    torch.testing.assert_close(launch(quantized_gather_gemm, *arguments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_strides(variant: str) -> None:
    gemms = Gemms(make_quantized(VARIANTS[variant], M=5, E=2, biased=True))
    for stage, arguments in gemms.inputs.items():
        strided = [
            spread(a) if isinstance(a, Tensor) and a.dtype is not torch.int32 else a for a in arguments
        ]
        gemms.check(stage, launch(OPS[stage], *strided))


@pytest.mark.parametrize("variant", [*TWO, "fp8_w8a8_channel", "int8_w8a16", "mxfp4_w4a16"])
def test_transposed_weights(variant: str) -> None:
    check(VARIANTS[variant], M=5, E=2, transposed=True)


@pytest.mark.parametrize("static", ["one", "each"])
def test_static_token_scales(static: str) -> None:
    """One for all rows, or one a row."""
    gemms = Gemms(make_quantized(Variant("fp8_w8a8_tensor"), M=6))
    for stage, arguments in gemms.inputs.items():
        x, scale, *rest = arguments
        scale = torch.rand(1) if static == "one" else torch.rand(x.size(0), 1)
        gemms.inputs[stage] = (x, scale, *rest)
        gemms.check(stage, run(gemms, stage))


@pytest.mark.parametrize(
    ("variant", "block_m"),
    [
        *(("fp8_w8a8_block-default", block_m) for block_m in (16, 32, 64, 128)),
        *(("int8_w8a16-default", 64), ("int4_w4a16-default", 32)),
    ],
)
def test_every_row_tile(variant: str, block_m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_ROW_TILES", (block_m,))
    tiles.tile_candidates.cache_clear()
    try:
        check(DEFAULTS[variant], M=40, K=64, I=33, E=2, dtype=torch.bfloat16)
    finally:
        tiles.tile_candidates.cache_clear()


@pytest.mark.parametrize(
    ("variant", "offsets"),
    [
        *((v, [0, 90, 3, -5]) for v in DEFAULTS),
        *(("fp8_w8a8_block-default", o) for o in ([7, 6, 5, 4], [-(2**31), 2**31 - 1, 2, 99])),
        ("int8_w8a16-default", [-(2**31), 2**31 - 1, 2, 99]),
    ],
    ids=str,
)
def test_in_bounds_whatever_the_sort_says(variant: str, offsets: list[int]) -> None:
    """The bounds checks of the interpreter raise on any access outside the arguments."""
    gemms = Gemms(make_quantized(DEFAULTS[variant], M=4, E=3, biased=True))
    slots = torch.tensor([0, -7, 99, 2**31 - 1, 3, 4, 5, 7], dtype=torch.int32)
    bounds = torch.tensor(offsets, dtype=torch.int32)
    for stage, arguments in gemms.inputs.items():
        launch(OPS[stage], *arguments[:5], slots, bounds, *arguments[7:])


@pytest.mark.parametrize(
    ("variant", "special"),
    [
        *((v, float("nan")) for v in VARIANTS if VARIANTS[v].scheme != "mxfp4_w4a16"),
        *((v, s) for v in (*TWO, "fp8_w8a8_tensor", "int8_w8a8_channel") for s in (0.0, 2.0**-130)),
    ],
)
def test_special_scales(variant: str, special: float) -> None:
    """What the formula makes of them, and nothing where other scales are."""
    gemms = Gemms(make_quantized(VARIANTS[variant], M=3, E=2))
    for stage, arguments in gemms.inputs.items():
        x, x_scale, w, w_scale, w_zp, *rest = arguments
        w_scale = w_scale.clone()
        w_scale[(1, *[0] * (w_scale.dim() - 1))] = special
        arguments = (x, x_scale, w, w_scale, w_zp, *rest)
        assert_alike(launch(OPS[stage], *arguments), OPS[stage](*arguments))


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_that_are_no_numbers(variant: str, special: float) -> None:
    """What shares a scale with them is NaN."""
    gemms = Gemms(make_quantized(VARIANTS[variant], M=3, E=2))
    arguments = list(gemms.inputs["quantized_scatter_gemm"])
    w2 = gemms.q.layer.w2.float()
    w2[1, 3, 5] = special
    q2 = VARIANTS[variant].quantize(w2)
    arguments[2:5] = q2
    result = launch(quantized_scatter_gemm, *arguments)
    assert result.isnan().any() or not (gemms.q.layer.topk_ids == 1).any()
    assert_alike(result, quantized_scatter_gemm(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", [0, 1, 120, 254, 255])
def test_special_exponents_of_mxfp4(exponent: int, dtype: torch.dtype) -> None:
    gemms = Gemms(make_quantized(VARIANTS["mxfp4_w4a16"], M=4, E=2, dtype=dtype))
    x, x_scale, w, w_scale, *rest = gemms.inputs["quantized_scatter_gemm"]
    x = x * 2.0 ** (120 if exponent < 2 else 0)
    arguments = (x, x_scale, w, torch.full_like(w_scale, exponent), *rest)
    assert_alike(launch(quantized_scatter_gemm, *arguments), quantized_scatter_gemm(*arguments))


def assert_alike(result: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 if result.dtype is torch.float32 else 2e-2
    bound = tolerance * expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=bound, equal_nan=True)
