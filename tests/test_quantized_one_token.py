"""A quantized layer of one token: compiled graphs take one op where it is faster."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import compile_moe
from compile_moe import FusedMoEQuantConfig
from compile_moe.ops.named_activations import program_text
from tests.support.fake_cuda import GeneratedKernels, cuda_empty, fake_cuda, generated_kernels
from tests.support.quantized import Variant, make_quantized

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

E, TOPK, K, I = 8, 2, 256, 128
OP = "quantized_one_token_experts"
STAGES = ["sort_tokens", "quantized_gather_gemm", "quantized_scatter_gemm", "weight_and_reduce"]
INT4, INT8, MX = Variant("int4_w4a16"), Variant("int8_w8a16"), Variant("mxfp4_w4a16")
ZEROS, NARROW = Variant("int4_w4a16", zero_points=True), Variant("int4_w4a16", (("group_size", 16),))
FP8, TENSOR = Variant("fp8_w8a8_channel"), Variant("fp8_w8a8_tensor")
#: Schemes that quantize tokens.
TOKENS = (FP8, TENSOR, Variant("fp8_w8a8_block"), Variant("int8_w8a8_channel"))
SILU = program_text("silu")
Function = Callable[..., Any]


def arguments(
    variant: Variant = INT4,
    m: int = 1,
    topk: int = TOPK,
    dtype: torch.dtype = torch.bfloat16,
    biased: bool = False,
    mapped: bool = False,
    static: bool = False,
) -> list[Any]:
    """Tokens, weights and routing; what the config has; options of the layer."""
    scheme = variant.made
    config: dict[str, Tensor] = {}
    weights = []
    for name, sizes in (("w1", (E, 2 * I, K)), ("w2", (E, K, I))):
        weights.append(cuda_empty(*scheme.weight_shape(*sizes), dtype=scheme.weight_dtype))
        config[f"{name}_scale"] = cuda_empty(*scheme.scale_shape(*sizes), dtype=scheme.scale_dtype or dtype)
        if variant.zero_points:
            zeros = scheme.zero_point_shape(*sizes)
            assert zeros is not None
            config[f"{name}_zp"] = cuda_empty(*zeros, dtype=torch.uint8)
    if static:
        config |= {name: cuda_empty(1, dtype=torch.float32) for name in ("a1_scale", "a2_scale")}
    options: dict[str, Tensor] = {}
    if biased:
        options = {"w1_bias": cuda_empty(E, 2 * I, dtype=dtype), "w2_bias": cuda_empty(E, K, dtype=dtype)}
    if mapped:
        options["expert_map"] = cuda_empty(2 * E, dtype=torch.int32)
    routing = cuda_empty(m, topk, dtype=torch.float32), cuda_empty(m, topk, dtype=torch.int64)
    return [cuda_empty(m, K, dtype=dtype), *weights, *routing, config, options]


def layer_of(variant: Variant = INT4, **settings: Any) -> Function:
    def layer(*args: Any) -> Tensor:
        *tensors, config, options = args
        quant_config = FusedMoEQuantConfig(variant.scheme, **(variant.options | config))
        return compile_moe.fused_experts(*tensors, quant_config=quant_config, **options, **settings)

    return layer


def generate(
    function: Function, make: Callable[[], list[Any]] = arguments, **options: Any
) -> GeneratedKernels:
    with torch.no_grad():
        return generated_kernels(function, make, joint_graph_constant_folding=False, **options)


def clamped(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.clamp(max=7)) * up


def by_hand(group_of_down: int) -> Function:
    """A layer of the stages, whose schemes may differ."""
    text = "int4_w4a16(group_size={})"

    def layer(*args: Any) -> Tensor:
        x, w1, w2, weights, ids, scales, _ = args
        ops, out = compile_moe.ops, (TOPK, text.format(128), x.dtype, None, SILU)
        order = ops.sort_tokens(ids, E)
        rows = ops.quantized_gather_gemm(x, None, w1, scales["w1_scale"], None, *order, *out)
        out = 1, TOPK, text.format(group_of_down), x.dtype
        fused_out = ops.quantized_scatter_gemm(rows, None, w2, scales["w2_scale"], None, *order, *out)
        return ops.weight_and_reduce(fused_out, weights, ids, None, E)

    return layer


def rows_quantized(variant: Variant, change: str = "") -> Function:
    """A layer of the stages, whose rows are quantized as the scheme says, or otherwise."""
    text = variant.made.text
    assert variant.made.token_scaling is not None
    scaling = variant.made.token_scaling.text

    def layer(*args: Any) -> Any:
        x, w1, w2, weights, ids, scales, _ = args
        ops, order = compile_moe.ops, compile_moe.ops.sort_tokens(ids, E)
        out = text, torch.float16 if change == "dtype" else x.dtype
        tokens = ops.quantize_tokens(x, scaling)
        gate_up = ops.quantized_gather_gemm(
            *tokens, w1, scales["w1_scale"], None, *order, TOPK, *out, None, SILU
        )
        rows = ops.quantize_tokens(
            gate_up,
            f"float8_e4m3fn per group of {I}" if change == "scaling" else scaling,
            scales["static"] if change == "static" else None,
            None,
            order[1] if change == "offsets" else None,
        )
        scale = rows[1].flip(0) if change == "other scales" else rows[1]
        fused_out = ops.quantized_scatter_gemm(
            rows[0], scale, w2, scales["w2_scale"], None, *order, 1, TOPK, text, x.dtype
        )
        reduced = ops.weight_and_reduce(fused_out, weights, ids, None, E)
        read = {"rows read": rows[0], "scales read": rows[1], "result read": gate_up}
        return (reduced, read[change]) if change in read else reduced

    return layer


SERVED: dict[str, tuple[Variant, dict[str, Any], dict[str, Any]]] = {
    "int4": (INT4, {}, {}),
    "int4, zero points": (ZEROS, {}, {}),
    "int4, float16": (INT4, {"dtype": torch.float16}, {}),
    "int8": (INT8, {}, {}),
    "int8, groups": (Variant("int8_w8a16", (("group_size", 64),), zero_points=True), {}, {}),
    "mxfp4": (MX, {}, {}),
    "biased": (MX, {"biased": True}, {"activation": "swigluoai"}),
    "mapped": (INT4, {"mapped": True}, {}),
    "callable": (INT4, {}, {"activation": clamped}),
    "one expert a token": (INT8, {"topk": 1}, {}),
    "four experts a token": (INT8, {"topk": 4}, {}),
}
NOT_SERVED: dict[str, tuple[Variant, dict[str, Any]]] = {
    "two tokens": (INT4, {"m": 2}),
    "static scales": (TENSOR, {"static": True}),
    "tokens quantized, float32": (TOKENS[-1], {"dtype": torch.float32}),
    "two quantized tokens": (FP8, {"m": 2}),
    "narrow groups": (NARROW, {}),
    "float32": (INT4, {"dtype": torch.float32}),
    "mxfp4, float16": (MX, {"dtype": torch.float16}),
}


@pytest.mark.parametrize("case", SERVED)
def test_one_op(case: str) -> None:
    variant, options, settings = SERVED[case]
    generated = generate(layer_of(variant, **settings), lambda: arguments(variant, **options))
    assert generated.op_calls == [OP] and not generated.triton_kernels


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {}),
        ({"biased": True, "mapped": True}, {"activation": "swigluoai"}),
        ({"topk": 4}, {"activation": clamped}),
    ],
    ids=["plain", "biased, mapped", "callable"],
)
@pytest.mark.parametrize("variant", TOKENS, ids=lambda variant: variant.scheme)
def test_one_op_behind_quantized_tokens(
    variant: Variant, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The rows between the GEMMs are quantized inside."""
    generated = generate(layer_of(variant, **settings), lambda: arguments(variant, **options))
    # Nothing is fused with what quantizes the token; one scale for all is left to inductor.
    in_front = [] if variant is TENSOR else ["quantize_tokens"]
    assert generated.op_calls == [*in_front, OP] and len(generated.triton_kernels) == (variant is TENSOR)


def test_no_float8() -> None:
    """Devices without it refuse as they did."""
    older = generate(layer_of(FP8), lambda: arguments(FP8), capability=(8, 0))
    assert OP not in older.op_calls and "quantized_gather_gemm" in " ".join(older.op_calls)
    int8 = TOKENS[-1]
    generated = generate(layer_of(int8), lambda: arguments(int8), capability=(8, 0))
    assert generated.op_calls == ["quantize_tokens", OP]


@pytest.mark.parametrize("case", NOT_SERVED)
def test_the_stages(case: str) -> None:
    variant, options = NOT_SERVED[case]
    generated = generate(layer_of(variant), lambda: arguments(variant, **options))
    called = [name.removesuffix(".out") for name in generated.op_calls]
    assert [name for name in called if name != "quantize_tokens"] == STAGES
    assert called.count("quantize_tokens") == (2 if variant in (FP8, TOKENS[-1]) else 0)


@pytest.mark.parametrize("is_few", [True, False])
@pytest.mark.parametrize(
    ("variant", "name"), [(INT4, "_ENOUGH_ROWS"), (FP8, "_ENOUGH_ROWS_OF_QUANTIZED")], ids=["int4", "fp8"]
)
def test_few_rows_of_weights_only(
    variant: Variant, name: str, is_few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = TOPK * min(2 * I, K)
    # A module that its op hides.
    monkeypatch.setattr(sys.modules[f"compile_moe.ops.{OP}"], name, rows + 1 if is_few else rows)
    assert (OP in generate(layer_of(variant), lambda: arguments(variant)).op_calls) is is_few


def test_dynamic_tokens_take_the_stages() -> None:
    generated = generate(layer_of(), lambda: arguments(m=8), dynamic_dims=[(0, 0), (3, 0), (4, 0)])
    assert OP not in generated.op_calls and "quantized_gather_gemm" in " ".join(generated.op_calls)


@pytest.mark.parametrize("group", [128, 64])
def test_stages_written_by_hand(group: int) -> None:
    """GEMMs of two schemes stay."""

    def make() -> list[Any]:
        *tensors, scales, options = arguments()
        return [*tensors, scales | {"w2_scale": cuda_empty(E, K, I // group)}, options]

    calls = [name.removesuffix(".out") for name in generate(by_hand(group), make).op_calls]
    assert calls == ([OP] if group == 128 else STAGES)


#: "other scales" of a token each, "static" ones of all.
CHANGES = "dtype", "scaling", "static", "offsets", "other scales", "rows read", "scales read", "result read"


@pytest.mark.parametrize("change", ["", *CHANGES])
def test_rows_quantized_by_hand(change: str) -> None:
    """As the scheme says, from GEMM 1's result alone, for GEMM 2 alone; all else stays."""
    variant = TENSOR if change == "static" else FP8

    def make() -> list[Any]:
        *tensors, scales, options = arguments(variant)
        return [*tensors, scales | {"static": cuda_empty(1, dtype=torch.float32)}, options]

    calls = generate(rows_quantized(variant, change), make).op_calls
    assert (OP in calls) is (not change) and ("quantized_scatter_gemm" in " ".join(calls)) is bool(change)


def test_kernels_of_a_block() -> None:
    """Behind the router's product: the router, the kernels of the op, and residual with norm."""

    def block(x: Tensor, router: Tensor, norm: Tensor, *rest: Any) -> Tensor:
        w1, w2, _, _, *more = rest
        weights, ids = (x @ router.t()).float().softmax(-1).topk(TOPK)
        return F.rms_norm(x + layer_of()(x, w1, w2, weights, ids, *more), norm.shape, norm)

    def make() -> list[Any]:
        x, *rest = arguments()
        return [x, cuda_empty(E, K), cuda_empty(K), *rest]

    generated = generate(block, make)
    assert [name.removesuffix(".out") for name in generated.op_calls] == ["route_tokens", OP]
    assert len(generated.triton_kernels) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights(dtype: torch.dtype) -> None:
    """To the tokens' dtype in the kernel, to another one in front of it."""

    def rounded(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        return layer_of()(x, w1, w2, weights.to(dtype), *rest)

    generated = generate(rounded)
    assert generated.op_calls == [OP]
    assert len(generated.triton_kernels) == (0 if dtype is torch.bfloat16 else 1)


def test_on_a_cpu() -> None:
    """On a CPU a compiled layer of one token has stages as any other."""
    q = make_quantized(INT4, M=1, dtype=torch.bfloat16)

    def layer(*args: Tensor) -> Tensor:
        return compile_moe.fused_experts(*args, quant_config=q.config())

    names = [kernel.name for kernel in compile_moe.explain(layer, *q.args).kernels]
    assert names[:3] == [f"compile_moe.{name}" for name in STAGES[:3]]


def test_explained() -> None:
    with fake_cuda(), FakeTensorMode(shape_env=ShapeEnv()):
        (kernel,) = compile_moe.explain(layer_of(), *arguments()).kernels
    assert (kernel.name, kernel.epilogue) == (f"compile_moe.{OP}", SILU)
