"""Each scheme's numbers: against decoders written from the formats, round trips, and weights that are no numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import compile_moe
from compile_moe.quantization import SCHEMES, QuantizedWeights, make_scheme, parse_scheme
from tests.support.quantized import VARIANTS, Variant

E, N = 2, 34


def weights(variant: Variant) -> Tensor:
    k = 3 * variant.made.column_multiple if variant.made.column_multiple > 1 else 53
    return torch.randn(E, N, k) * torch.tensor([1.0, 30.0]).view(E, 1, 1)


def sizes(variant: Variant) -> dict[str, Any]:
    return variant.options


def nibble(packed: Tensor, index: tuple[int, ...]) -> int:
    byte = int(packed[(*index[:-1], index[-1] // 2)])
    return byte >> 4 if index[-1] % 2 else byte & 15


def e2m1(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def int4(q: QuantizedWeights, e: int, n: int, k: int, group_size: int) -> float:
    zero = 8
    if q.zero_point is not None:
        byte = int(q.zero_point[e, n // 2, k // group_size])
        zero = byte >> 4 if n % 2 else byte & 15
    return (nibble(q.weight, (e, n, k)) - zero) * q.scale[e, n, k // group_size].item()


def int8(q: QuantizedWeights, e: int, n: int, k: int, group_size: int | None = None) -> float:
    at = (e, n) if group_size is None else (e, n, k // group_size)
    zero = 128 if q.zero_point is None else int(q.zero_point[at])
    return (int(q.weight[e, n, k]) - zero) * q.scale[at].item()


def block(q: QuantizedWeights, e: int, n: int, k: int, block_shape: tuple[int, int]) -> float:
    return q.weight[e, n, k].item() * q.scale[e, n // block_shape[0], k // block_shape[1]].item()


#: One element of the weights, from the README's table. A scheme that isn't here has all other tests.
DECODERS: dict[str, Callable[..., float]] = {
    "fp8_w8a8_tensor": lambda q, e, n, k: q.weight[e, n, k].item() * q.scale[e].item(),
    "fp8_w8a8_channel": lambda q, e, n, k: q.weight[e, n, k].item() * q.scale[e, n, 0].item(),
    "int8_w8a8_channel": lambda q, e, n, k: int(q.weight[e, n, k]) * q.scale[e, n, 0].item(),
    "fp8_w8a8_block": block,
    "int8_w8a16": int8,
    "int4_w4a16": int4,
    "mxfp4_w4a16": lambda q, e, n, k: (
        e2m1(nibble(q.weight, (e, n, k))) * 2.0 ** (int(q.scale[e, n, k // 32]) - 127)
    ),
}


def decodable() -> list[str]:
    return [v for v in VARIANTS if VARIANTS[v].scheme in DECODERS]


@pytest.mark.parametrize("variant", decodable())
def test_dequantized_as_the_format_says(variant: str) -> None:
    v = VARIANTS[variant]
    w = weights(v)
    q = v.quantize(w)
    decode, back = DECODERS[v.scheme], v.dequantize(q, torch.float64)
    for e in range(E):
        for n in range(N):
            for k in range(w.size(2)):
                assert decode(q, e, n, k, **sizes(v)) == pytest.approx(back[e, n, k].item(), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layout_as_described(variant: str) -> None:
    v = VARIANTS[variant]
    w = weights(v).half()
    q, scheme = v.quantize(w), v.made
    assert (tuple(q.weight.shape), q.weight.dtype) == (scheme.weight_shape(*w.shape), scheme.weight_dtype)
    assert (tuple(q.scale.shape), q.scale.dtype) == (
        scheme.scale_shape(*w.shape),
        scheme.scale_dtype or w.dtype,
    )
    assert (q.zero_point is not None) is v.zero_points
    if q.zero_point is not None:
        expected = (scheme.zero_point_shape(*w.shape), torch.uint8)
        assert (tuple(q.zero_point.shape), q.zero_point.dtype) == expected
    assert all(t is None or t.is_contiguous() for t in q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_error_is_that_of_the_number_format(variant: str, dtype: torch.dtype) -> None:
    """In units of an expert's largest weight: half a step of the format, with rounded zero points and scales of 16 bits
    up to two.
    """
    v = VARIANTS[variant]
    w = weights(v).to(dtype)
    back = v.dequantize(v.quantize(w), torch.float64)
    steps = {"fp8": 1 / 24, "int8": 1.6 / 127, "int4": 1 / 7, "mxfp4": 1 / 4}
    step = next((s for prefix, s in steps.items() if v.scheme.startswith(prefix)), 1.0)
    error = (back - w.double()).abs()
    assert (error.amax((1, 2)) <= step * w.double().abs().amax((1, 2))).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_dequantized_weights_quantize_to_themselves(variant: str) -> None:
    v = VARIANTS[variant]
    w = v.dequantize(v.quantize(weights(v)), torch.float32)
    again = v.dequantize(v.quantize(w), torch.float32)
    torch.testing.assert_close(again, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_are_independent(variant: str) -> None:
    v = VARIANTS[variant]
    w = weights(v)
    both, last = v.quantize(w), v.quantize(w[1:])
    for of_both, of_last in zip(both, last, strict=True):
        assert of_both is of_last is None or torch.equal(
            of_both[1:].view(torch.uint8), of_last.view(torch.uint8)
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros(variant: str) -> None:
    v = VARIANTS[variant]
    q = v.quantize(torch.zeros_like(weights(v)))
    assert v.made.scale_dtype is torch.uint8 or (q.scale > 0).all()
    assert (v.dequantize(q, torch.float32) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_denormals(variant: str, dtype: torch.dtype) -> None:
    """Scales stay normal numbers (but for float16), so that nothing divides by what a GPU flushes to zero."""
    v = VARIANTS[variant]
    w = (weights(v).sign() * torch.finfo(dtype).smallest_normal / 4).to(dtype)
    q = v.quantize(w)
    back = v.dequantize(q, torch.float64)
    assert torch.isfinite(back).all()
    if q.scale.dtype in (torch.float32, torch.bfloat16):
        assert (q.scale.float() >= 2.0**-126).all()
    assert ((back - w.double()).abs() <= w.double().abs() + 2.0**-24).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_numbers(variant: str, value: float) -> None:
    """All that shares the scale is NaN, and nothing else is."""
    v = VARIANTS[variant]
    w = weights(v)
    clean = v.dequantize(v.quantize(w), torch.float64)
    w[1, 2, 3] = value
    back = v.dequantize(v.quantize(w), torch.float64)
    assert back[1, 2, 3].isnan()
    assert torch.equal(back[0], clean[0])
    shares = back.isnan()
    assert torch.equal(back[~shares], clean[~shares])
    if v.made.token_scaling is None or v.made.token_scaling.per == "token":
        assert not shares[1, 0].any()
    if "group_size" in sizes(v):
        assert shares.sum() == sizes(v)["group_size"]


def test_ties_of_e2m1_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 6.0, -0.25, -5.0])
    w = torch.zeros(1, 1, 32)
    w[0, 0, : len(ties)] = ties
    back = compile_moe.dequantize_weights(
        *(lambda q: (q.weight, "mxfp4_w4a16", q.scale))(compile_moe.quantize_weights(w, "mxfp4_w4a16")),
        dtype=torch.float32,
    )
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 0.0, -4.0]
    assert back[0, 0, : len(ties)].tolist() == expected


@pytest.mark.parametrize("exponent", [0, 1, 127, 254, 255])
def test_every_exponent_of_mxfp4(exponent: int) -> None:
    packed = torch.full((1, 1, 16), 0x2A, dtype=torch.uint8)  # -1, then 1
    scale = torch.full((1, 1, 1), exponent, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        back = compile_moe.dequantize_weights(packed, "mxfp4_w4a16", scale, dtype=dtype)
        expected = math.nan if exponent == 255 else 2.0 ** (exponent - 127)
        torch.testing.assert_close(back[0, 0, 1].item(), expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back[0, 0, 0].item(), -expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_says_it_all(variant: str) -> None:
    scheme = VARIANTS[variant].made
    assert parse_scheme(scheme.text) == scheme
    assert scheme.text.startswith(f"{scheme.name}(")


def test_registry() -> None:
    assert len(SCHEMES) >= len(DECODERS) and all(name == s.name for name, s in SCHEMES.items())


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("fp8", {}, r"scheme must be one of fp8_w8a8_block, .*mxfp4_w4a16, got 'fp8'"),
        ("fp8_w8a8_tensor", {"group_size": 16}, r"fp8_w8a8_tensor takes no parameters, got group_size=16"),
        ("int4_w4a16", {"block_shape": (2, 2)}, r"takes group_size, got block_shape=\(2, 2\)"),
        ("int4_w4a16", {"group_size": 0}, r"must be a positive multiple of 2, got 0"),
        ("int4_w4a16", {"group_size": 3}, r"must be a positive multiple of 2, got 3"),
        ("int8_w8a16", {"group_size": "8"}, r"must be a positive int, got '8'"),
        ("fp8_w8a8_block", {"block_shape": (128,)}, r"tuple of two positive ints, got \(128,\)"),
        ("fp8_w8a8_block", {"block_shape": (0, 1)}, r"tuple of two positive ints, got \(0, 1\)"),
    ],
)
def test_wrong_schemes(scheme: str, options: dict[str, Any], message: str) -> None:
    for call in (
        lambda: compile_moe.quantize_weights(torch.ones(1, 2, 128), scheme, **options),
        lambda: compile_moe.FusedMoEQuantConfig(scheme, **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"scheme must be one of"):
        make_scheme("none")


@pytest.mark.parametrize(
    ("w", "scheme", "options", "kind", "message"),
    [
        (
            torch.ones(2, 3),
            "int8_w8a16",
            {},
            ValueError,
            r"w must be \(E, N, K\), none of them 0, got \(2, 3\)",
        ),
        (torch.ones(2, 3, 0), "int8_w8a16", {}, ValueError, r"none of them 0, got \(2, 3, 0\)"),
        (torch.ones(2, 3, 4).int(), "int8_w8a16", {}, TypeError, r"w must be one of .*got torch.int32"),
        ([1], "int8_w8a16", {}, TypeError, r"w must be a tensor, got list"),
        (torch.ones(2, 3, 40), "mxfp4_w4a16", {}, ValueError, r"multiple of 32, got .*\(2, 3, 40\)"),
        (
            torch.ones(2, 3, 40),
            "int4_w4a16",
            {},
            ValueError,
            r"multiple of 128, got .*\(2, 3, 40\); use another",
        ),
        (torch.ones(2, 3, 4), "fp8_w8a8_tensor", {"zero_points": True}, ValueError, r"has no zero points"),
        (torch.ones(2, 3, 4), "int8_w8a16", {"zero_points": True}, ValueError, r"has no zero points"),
        (
            *(torch.ones(2, 3, 4), "int4_w4a16", {"zero_points": True, "group_size": 4}),
            *(ValueError, r"N that is a multiple of 2, got w .*\(2, 3, 4\)"),
        ),
    ],
)
def test_wrong_weights(
    w: Any, scheme: str, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        compile_moe.quantize_weights(w, scheme, **options)


def test_wrong_quantized_weights() -> None:
    q = compile_moe.quantize_weights(torch.ones(2, 4, 32), "int4_w4a16", group_size=16)
    with pytest.raises(
        ValueError, match=r"weight_scale must be \(2, 4, 4\), .* scheme int4_w4a16\(group_size=8\)"
    ):
        compile_moe.dequantize_weights(q.weight, "int4_w4a16", q.scale, group_size=8)
    with pytest.raises(TypeError, match=r"dtype must be one of .*got torch.int8"):
        compile_moe.dequantize_weights(q.weight, "int4_w4a16", q.scale, group_size=16, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"weight must be \(E, N, K\) .*got \(4, 16\)"):
        compile_moe.dequantize_weights(q.weight[0], "int4_w4a16", q.scale[0], group_size=16)
