"""Wrong arguments of the ops of quantized layers, of configs and of calls: the error says what is accepted."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import compile_moe
from compile_moe import FusedMoEModularKernel, MoEPrepareAndFinalizeNoEP, TorchExperts, TritonExperts
from tests.support.oracle import make_layer
from tests.support.quantized import VARIANTS, Quantized, Variant, make_quantized
from tests.support.quantized_inputs import STAGES, op, stage_inputs

#: Name of the case, variant, position of the argument, its new value, the error, what its message says.
Change = tuple[str, str, int, Callable[[Any], Any], type[Exception], str]
FP8, INT4, INT8 = "fp8_w8a8_channel", "int4_w4a16-group_size16-zp", "int8_w8a16"
BLOCK, MX, TENSOR = "fp8_w8a8_block-block_shape(16,24)", "mxfp4_w4a16", "fp8_w8a8_tensor"

# M = 9, K = 48 (64 in groups of 32), I = 40, N = 80, E = 5, topk = 2
# fmt: off
GATHER: list[Change] = [
    ("x-float", FP8, 0, lambda t: t.float(), TypeError, r"must be .*float8_e4m3fn .*got .*float32; quantize"),
    ("x-1d", FP8, 0, lambda t: t[0], ValueError, r"hidden_states must be 2-dimensional, got \(48,\)"),
    ("x-quantized", INT4, 0, lambda t: t.to(torch.int8), TypeError, r"must be torch.float32 .*got torch.int8"),
    ("scale-missing", FP8, 1, lambda t: None, ValueError, r"a1q_scale is missing: scheme fp8_w8a8_channel\(\)"),
    ("scale-superfluous", INT4, 1, lambda t: torch.ones(9, 1), ValueError, r"quantize tokens: a1q_scale must be None"),
    ("scale-1d", FP8, 1, lambda t: t[:, 0], ValueError, r"a1q_scale must be \(9, 1\) .*per token\), got \(9,\)"),
    ("scale-groups", BLOCK, 1, lambda t: t[:, :1], ValueError, r"must be \(9, 2\) .*of 24\), got \(9, 1\)"),
    ("scale-half", FP8, 1, lambda t: t.half(), TypeError, r"a1q_scale must be float32 .*got torch.float16"),
    ("scale-of-experts", TENSOR, 1, lambda t: torch.ones(5), ValueError, r"must be \(1,\) or \(9, 1\) .*got \(5,\)"),
    ("w-2d", FP8, 2, lambda t: t[0], ValueError, r"w1 must be \(E, N, K\), got \(80, 48\)"),
    ("w-narrow", FP8, 2, lambda t: t[..., :40], ValueError, r"w1 must be \(5, 80, 48\) .*got \(5, 80, 40\)"),
    ("w-unpacked", INT4, 2, lambda t: t.repeat(1, 1, 2), ValueError, r"w1 .*\(5, 96, 24\) .*got \(5, 96, 48\)"),
    ("w-int8", INT8, 2, lambda t: t.to(torch.int8), TypeError, r"w1 must be torch.uint8 for .*got torch.int8"),
    ("w-elsewhere", FP8, 2, lambda t: t.to("meta"), ValueError, r"got (meta|cpu)"),
    ("w-scale-shape", FP8, 3, lambda t: t[..., 0], ValueError, r"w1_scale .* \(5, 80, 1\), .*float32 .*got \(5, 80\)"),
    ("w-scale-dtype", FP8, 3, lambda t: t.half(), TypeError, r"w1_scale .* \(5, 80, 1\), .*float32 .*got .*float16"),
    ("w-scale-act", INT4, 3, lambda t: t.half(), TypeError, r"w1_scale .* \(5, 96, 3\), .*float32 .*got .*float16"),
    ("w-scale-mx", MX, 3, lambda t: t.float(), TypeError, r"w1_scale .* \(5, 128, 2\), .*uint8 .*got torch.float32"),
    ("w-scale-blocks", BLOCK, 3, lambda t: t[:, :4], ValueError, r"w1_scale .* \(5, 5, 2\), .*got \(5, 4, 2\)"),
    ("zp-superfluous", FP8, 4, lambda t: torch.ones(5, 80, 1).byte(), ValueError, r"no zero .*got \(5, 80, 1\)"),
    ("zp-unpacked", INT4, 4, lambda t: t.repeat(1, 2, 1), ValueError, r"w1_zp .*\(5, 48, 3\), .*got \(5, 96, 3\)"),
    ("zp-int8", INT4, 4, lambda t: t.to(torch.int8), TypeError, r"w1_zp .* \(5, 48, 3\), .*uint8 .*got torch.int8"),
    ("slots-fewer", FP8, 5, lambda t: t[:3], ValueError, r"sorted_slots must be .*9 \* 2,\), got \(3,\)"),
    ("topk-0", FP8, 7, lambda t: 0, ValueError, r"topk must be at least 1, got 0"),
    ("scheme-unknown", FP8, 8, lambda t: "fp3()", ValueError, r"scheme must be one of fp8_w8a8_block, .*got 'fp3'"),
    ("scheme-text", FP8, 8, lambda t: "fp8", ValueError, r"scheme must read NAME\(PARAMETER=VALUE, ...\), got 'fp8'"),
    ("scheme-group", INT4, 8, lambda t: "int4_w4a16(group_size=32)", ValueError, r"multiple of 32, got \(5, 96, 48\)"),
    ("out-dtype", FP8, 9, lambda t: torch.int32, TypeError, r"out_dtype.* must be one of .*got torch.int32"),
    ("bias-dtype", FP8, 10, lambda t: t.half(), TypeError, r"w1_bias must .*float32, got .*float16"),
    ("bias-narrow", FP8, 10, lambda t: t[:, :4], ValueError, r"w1_bias must be \(E, N\) = \(5, 80\), got \(5, 4\)"),
    ("epilogue", FP8, 11, lambda t: "silu", ValueError, r"epilogue must begin with .*got 'silu'"),
]
SCATTER: list[Change] = [
    ("rows-fewer", FP8, 0, lambda t: t[:4], ValueError, r"intermediate_scale must be \(4, 1\) .*got \(18, 1\)"),
    ("rows-fewer-int4", INT4, 0, lambda t: t[:4], ValueError, r"must have a row a slot, 18, got \(4, 48\)"),
    ("w-narrow", FP8, 2, lambda t: t[..., :8], ValueError, r"w2 must be \(5, 48, 40\) .*got \(5, 48, 8\)"),
    ("w-scale", FP8, 3, lambda t: t[:3], ValueError, r"w2_scale must be \(5, 48, 1\), .*got \(3, 48, 1\)"),
    ("other-M", FP8, 7, lambda t: 4, ValueError, r"sorted_slots must be .*4 \* 2,\), got \(18,\)"),
]
TOKENS: list[Change] = [
    ("int", FP8, 0, lambda t: t.int(), TypeError, r"tokens must be one of .*got torch.int32"),
    ("1d", FP8, 0, lambda t: t[0], ValueError, r"tokens must be \(M, K\), got \(48,\)"),
    ("scaling", FP8, 1, lambda t: "int4 per token", ValueError, r"scaling must read .*got 'int4 per token'"),
    ("no-group", FP8, 1, lambda t: "int8 per group of 0", ValueError, r"scaling must read .*got 'int8 per group of 0'"),
    ("static", FP8, 2, lambda t: torch.ones(1), ValueError, r"per token are computed .*scale must be None, got \(1,\)"),
    ("static-shape", TENSOR, 2, lambda t: torch.ones(5), ValueError, r"scale must be \(1,\) or \(9, 1\) .*got \(5,\)"),
]
LINEAR: list[Change] = [
    ("offsets", FP8, 5, lambda t: t[:3], ValueError, r"expert_offsets must be \(E \+ 1,\) = \(6,\), got \(3,\)"),
    ("offsets-int64", FP8, 5, lambda t: t.long(), TypeError, r"expert_offsets must be int32, got torch.int64"),
]
ONE_TOKEN: list[Change] = [
    ("x-two", INT8, 0, lambda t: t.repeat(2, 1), ValueError, r"topk_ids must have one row a .* got \(1, 2\)"),
    ("x-1d", INT8, 0, lambda t: t[0], ValueError, r"hidden_states must be \(M, K\), got \(48,\)"),
    ("x-narrow", INT8, 0, lambda t: t[:, :3], ValueError, r"must agree in K, got \(1, 3\), \(5, 80, 48\)"),
    ("x-int", INT8, 0, lambda t: t.int(), TypeError, r"hidden_states must be torch.float32 .*got torch.int32"),
    ("x-float", FP8, 0, lambda t: t.float(), TypeError, r"must be .*float8_e4m3fn .*got .*float32; quantize"),
    ("scale-missing", FP8, 1, lambda t: None, ValueError, r"a1q_scale is missing: scheme fp8_w8a8_channel\(\)"),
    ("scale-superfluous", INT8, 1, lambda t: torch.ones(1, 1), ValueError, r"tokens: a1q_scale must be None"),
    ("scale-groups", BLOCK, 1, lambda t: t[:, :1], ValueError, r"must be \(1, 2\) .*of 24\), got \(1, 1\)"),
    ("w1-2d", INT8, 2, lambda t: t[0], ValueError, r"w1 must be \(E, N, K\) and w2 .*got \(80, 48\)"),
    ("w1-int8", INT8, 2, lambda t: t.to(torch.int8), TypeError, r"w1 must be torch.uint8 for .*got torch.int8"),
    ("w1-unpacked", INT4, 2, lambda t: t.repeat(1, 1, 2), ValueError, r"w1 .*\(5, 96, 24\) .*got \(5, 96, 48\)"),
    ("w1-scale", INT8, 3, lambda t: t[:, :8], ValueError, r"w1_scale must be \(5, 80\), .*got \(5, 8\)"),
    ("w1-scale-dtype", MX, 3, lambda t: t.float(), TypeError, r"w1_scale .*uint8 .*got torch.float32"),
    ("w1-zp", INT4, 4, lambda t: t.repeat(1, 2, 1), ValueError, r"w1_zp .*\(5, 48, 3\), .*got \(5, 96, 3\)"),
    ("w1-zp-none", INT8, 4, lambda t: torch.ones(5, 80, 1).byte(), ValueError, r"no zero points: w1_zp must be None"),
    ("w2-fewer", INT8, 5, lambda t: t[:3], ValueError, r"same number of experts, got w1 .* and w2 \(3, 48, 40\)"),
    ("w2-narrow", INT4, 5, lambda t: t[..., :8], ValueError, r"N = 2 \* I .*\(5, 48, 8\), which holds 2 columns"),
    ("w2-elsewhere", INT8, 5, lambda t: t.to("meta"), ValueError, r"w2 must be on .*, cpu, got meta"),
    ("w2-scale", INT8, 6, lambda t: t[:3], ValueError, r"w2_scale must be \(5, 48\), .*got \(3, 48\)"),
    ("w2-zp", INT4, 7, lambda t: t[:3], ValueError, r"w2_zp must be \(5, 24, 3\), .*got \(3, 24, 3\)"),
    ("weights-int", INT8, 8, lambda t: t.int(), TypeError, r"topk_weights must be floating point, got torch.int32"),
    ("weights-1d", INT8, 8, lambda t: t[0], ValueError, r"topk_weights must have the shape of topk_ids, \(1, 2\)"),
    ("ids-float", INT8, 9, lambda t: t.float(), TypeError, r"topk_ids must be int32 or int64, got torch.float32"),
    ("ids-many", INT8, 9, lambda t: t.repeat(1, 3), ValueError, r"must have the shape of topk_ids, \(1, 6\)"),
    ("scheme-of-tokens", INT8, 10, lambda t: "int8_w8a8_channel()", TypeError, r"be torch.int8 .*got .*; quantize"),
    ("scheme-unknown", INT8, 10, lambda t: "fp3()", ValueError, r"scheme must be one of fp8_w8a8_block, .*got 'fp3'"),
    ("scheme-group", INT4, 10, lambda t: "int4_w4a16(group_size=32)", ValueError, r"multiple of 32, got \(5, 96, 48\)"),
    ("out-dtype", FP8, 11, lambda t: torch.int32, TypeError, r"out_dtype.* must be one of .*got torch.int32"),
    ("out-dtype-other", INT8, 11, lambda t: torch.half, TypeError, r"must be torch.float16 .*got torch.float32"),
    ("map-float", INT8, 12, lambda t: torch.ones(5), TypeError, r"map must be int32 or int64, got torch.float32"),
    ("map-short", INT8, 12, lambda t: torch.zeros(1).int(), ValueError, r"topk must be at most .*experts, 1, got 2"),
    ("bias1-dtype", INT8, 13, lambda t: t.half(), TypeError, r"w1_bias must .*float32, got .*float16"),
    ("bias2-narrow", INT8, 14, lambda t: t[:, :4], ValueError, r"w2_bias must be \(E, K\) = \(5, 48\), got \(5, 4\)"),
    ("epilogue", INT8, 15, lambda t: "silu", ValueError, r"epilogue must begin with .*got 'silu'"),
    ("epilogue-ungated", INT8, 15, lambda t: "", ValueError, r"must have N = I for w2 .*, got \(5, 80, 48\)"),
]
# fmt: on
CHANGES = dict(zip(STAGES, (TOKENS, GATHER, SCATTER, LINEAR, ONE_TOKEN), strict=True))


@pytest.fixture(autouse=True)
def quiet_fakes() -> Iterator[None]:
    """Torch logs a traceback of everything that raises inside a fake."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.mark.parametrize(
    ("stage", "change"),
    [pytest.param(s, c, id=f"{s}-{c[0]}") for s, changes in CHANGES.items() for c in changes],
)
def test_wrong_argument(stage: str, change: Change) -> None:
    _, variant, position, new, kind, message = change
    arguments = list(stage_inputs(make_quantized(VARIANTS[variant], biased=True))[stage])
    arguments[position] = new(arguments[position])
    with pytest.raises(kind) as real:
        op(stage)(*arguments)
    assert re.search(message, str(real.value)), str(real.value)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(Exception) as fake:
        op(stage)(*tree_map_only(Tensor, mode.from_tensor, arguments))
    assert (fake.type, str(fake.value)) == (real.type, str(real.value))


def test_zero_points_of_odd_rows() -> None:
    q = make_quantized(Variant("int4_w4a16", (("group_size", 16),)))
    arguments = list(stage_inputs(q)["quantized_gather_gemm"])
    arguments[2], arguments[3] = arguments[2][:, :79], arguments[3][:, :79]
    arguments[4] = torch.zeros(5, 39, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"w1_zp .*packs 2 rows: w1 \(E, N, K\) .* got \(5, 79, 48\)"):
        op("quantized_gather_gemm")(*arguments)


CHANNEL, STATIC = VARIANTS["fp8_w8a8_channel"], VARIANTS["fp8_w8a8_tensor"]
GROUPED = VARIANTS["int4_w4a16-group_size16-zp"]
EXPERTS: dict[str, type[Any]] = {"triton": TritonExperts, "torch": TorchExperts}


def with_config(q: Quantized, experts: str = "triton", **changes: Any) -> Callable[..., Tensor]:
    config = q.config(**changes)
    return FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(config), EXPERTS[experts](quant_config=config))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", ["w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale"])
def test_scales_that_contradict_the_config(name: str, experts: str) -> None:
    q = make_quantized(
        STATIC if name.startswith("a") else GROUPED, static="one" if name.startswith("a") else ""
    )
    with pytest.raises(
        ValueError, match=rf"{name} of the call and {name} of the quant_config are two tensors"
    ):
        with_config(q, experts)(*q.args, **{name: q.scales[name].clone()})  # type: ignore[union-attr]


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", ["w1_scale", "w2_scale"])
def test_missing_scale(name: str, experts: str) -> None:
    q = make_quantized(CHANNEL)
    with pytest.raises(
        ValueError, match=rf"{name} is missing: scheme fp8_w8a8_channel\(\) needs \(E, N, 1\) of w\d"
    ):
        with_config(q, experts, **{name: None})(*q.args)


@pytest.mark.parametrize("experts", EXPERTS)
def test_one_of_two_zero_points(experts: str) -> None:
    q = make_quantized(GROUPED)
    with pytest.raises(ValueError, match="w1_zp and w2_zp must be given both or neither, got w2_zp only"):
        with_config(q, experts, w1_zp=None)(*q.args)


def test_one_of_two_static_scales() -> None:
    q = make_quantized(STATIC, static="one")
    with pytest.raises(ValueError, match=r"both \(static\) or neither \(dynamic\), got a2_scale only"):
        with_config(q, a1_scale=None)(*q.args)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (
            torch.ones(3),
            ValueError,
            r"a2_scale must hold one scale, \(\), \(1,\) or \(E,\) = \(5,\), got \(3,\)",
        ),
        (torch.ones(5).half(), TypeError, r"a2_scale must be float32, got torch.float16"),
        (torch.ones(5, 1), ValueError, r"a2_scale must hold one scale, .*got \(5, 1\)"),
    ],
    ids=["3-of-5", "half", "2d"],
)
def test_wrong_static_scale(value: Tensor, kind: type[Exception], message: str, experts: str) -> None:
    q = make_quantized(STATIC, static="one")
    with pytest.raises(kind, match=message):
        with_config(q, experts, a2_scale=value)(*q.args)


@pytest.mark.parametrize(
    ("scheme", "scales", "message"),
    [
        ("fp8_w8a8_channel", ["w1_zp"], r"has no zero points: w1_zp must be None"),
        ("mxfp4_w4a16", ["w1_zp", "w2_zp"], r"has no zero points: w1_zp and w2_zp must be None"),
        ("int8_w8a16", ["w2_zp"], r"int8_w8a16\(group_size=None\) has no zero points: w2_zp"),
        ("int4_w4a16", ["a1_scale"], r"doesn't quantize tokens: a1_scale must be None"),
        ("fp8_w8a8_block", ["a2_scale"], r"computes .*per group of 128\): a2_scale must be None"),
        ("int8_w8a8_channel", ["a1_scale"], r"computes .*\(int8 per token\): a1_scale must be None"),
    ],
)
def test_superfluous_scales(scheme: str, scales: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_moe.FusedMoEQuantConfig(scheme, **{name: torch.ones(1) for name in scales})  # type: ignore[arg-type]


def test_scale_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="w1_scale must be a tensor or None, got float"):
        compile_moe.FusedMoEQuantConfig("fp8_w8a8_tensor", w1_scale=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("experts", EXPERTS)
def test_tokens_that_nobody_quantized(experts: str) -> None:
    q = make_quantized(CHANNEL)
    kernel = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(), EXPERTS[experts](quant_config=q.config()))
    with pytest.raises(
        TypeError, match=r"must be torch.float8_e4m3fn .*got torch.float32; quantize it, as MoEPrepare"
    ):
        kernel(*q.args)


@pytest.mark.parametrize("experts", EXPERTS)
def test_config_of_the_parts_differs(experts: str) -> None:
    q = make_quantized(CHANNEL)
    parts = MoEPrepareAndFinalizeNoEP(compile_moe.FusedMoEQuantConfig("fp8_w8a8_tensor"))
    with pytest.raises(
        ValueError, match=r"(a1q_scale|rows_scale) must be \(\d+, 1\) .*per token\), got \(1,\)"
    ):
        FusedMoEModularKernel(parts, EXPERTS[experts](quant_config=q.config()))(*q.args)


def test_quantized_weights_without_a_config() -> None:
    q = make_quantized(CHANNEL)
    with pytest.raises(TypeError, match=r"w1 must be .*16 bits.*got torch.float8_e4m3fn.*pass quant_config="):
        compile_moe.fused_experts(*q.args)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"w1 must be .*16 bits"):
            compile_moe.fused_experts(*q.args)
        x, w1, _, _, ids = q.args
        order = compile_moe.ops.sort_tokens(ids, w1.size(0))
        with pytest.raises(
            TypeError, match=r"w1 must have the dtype of hidden_states, .*got torch.float8_e4m3fn"
        ):
            compile_moe.ops.gather_gemm(x, w1, *order, ids.size(1))


def test_unquantized_weights_with_a_config_of_packed_ones() -> None:
    layer = make_layer(K=64, I=64)
    scale = torch.ones(1)
    config = compile_moe.FusedMoEQuantConfig("mxfp4_w4a16", w1_scale=scale, w2_scale=scale)
    with pytest.raises(
        TypeError, match=r"2 numbers in an element of uint8, got torch.float32 .*quantize_weights"
    ):
        compile_moe.fused_experts(*layer.args, quant_config=config)


def test_sizes_that_are_none() -> None:
    with pytest.raises(TypeError, match="block_shape must be two ints, rows and columns, got 128"):
        compile_moe.FusedMoEQuantConfig("fp8_w8a8_block", block_shape=128)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"multiple of 32, got w .*\(2, 8, 70\)$"):
        compile_moe.quantize_weights(torch.ones(2, 8, 70), "mxfp4_w4a16")
    with pytest.raises(ValueError, match=r"multiple of 128, got w .*\(2, 8, 70\); use another group size$"):
        compile_moe.quantize_weights(torch.ones(2, 8, 70), "int4_w4a16")


@pytest.mark.parametrize("variant", VARIANTS)
def test_intermediate_size(variant: str) -> None:
    q = make_quantized(VARIANTS[variant])
    x, w1, w2, weights, ids = q.args
    with pytest.raises(ValueError, match=r"N = I .*'relu2_no_mul'"):
        compile_moe.fused_experts(x, w1, w2, weights, ids, activation="relu2_no_mul", quant_config=q.config())
