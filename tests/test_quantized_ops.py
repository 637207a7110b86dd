"""The ops of quantized layers: opcheck, fake equals real, ``.out``, accuracy, CUDA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from compile_moe.ops.sort_tokens import sort_tokens_torch
from compile_moe.quantization import parse_scaling
from tests.support.launchers import launch
from tests.support.oracle import CASES, make_layer
from tests.support.quantized import ONE_A_SCALING, VARIANTS, make_quantized
from tests.support.quantized_inputs import STAGES, op, opcheck, stage_inputs

SHAPES = (
    "plain",
    "M0",
    "M1",
    "odd",
    "biased",
    "mapped-int32-biased",
    "skipped",
    "strided",
    "ungated",
    "transposed",
)


def cases(variants: Iterable[str] = VARIANTS) -> list[Any]:
    """Every scheme once, and every shape with a scheme that takes any."""
    fp8 = "fp8_w8a8_block-block_shape(16,24)"
    return with_stages([*((v, "biased") for v in variants), *((fp8, c) for c in SHAPES if c != "biased")])


def with_stages(named: Iterable[tuple[str, str]]) -> list[Any]:
    """Variants and cases with each op."""
    return [
        pytest.param(variant, case, stage, id=f"{variant}-{case}-{stage}")
        for variant, case in named
        for stage in STAGES
    ]


# A scheme is a string to an op: those of the same scaling and zero points differ in numbers alone.
CHECKED = (*ONE_A_SCALING, "int4_w4a16-group_size16-zp", "int8_w8a16", "mxfp4_w4a16")


@pytest.mark.parametrize(("variant", "case", "stage"), cases(CHECKED))
def test_opcheck(variant: str, case: str, stage: str) -> None:
    opcheck(op(stage), stage_inputs(make_quantized(VARIANTS[variant], **CASES[case]))[stage])


@pytest.mark.parametrize("static", ["one", "each"])
def test_opcheck_of_static_scales(static: str) -> None:
    x, scale = torch.randn(5, 24), torch.rand(1) if static == "one" else torch.rand(5, 1)
    opcheck(op("quantize_tokens"), (x, "float8_e4m3fn per tensor", scale))


@pytest.mark.parametrize(("variant", "case", "stage"), cases())
def test_fake_equals_real(variant: str, case: str, stage: str) -> None:
    arguments = stage_inputs(make_quantized(VARIANTS[variant], **CASES[case]))[stage]
    real = op(stage)(*arguments)
    with FakeTensorMode() as mode:
        fake = op(stage)(*tree_map_only(Tensor, mode.from_tensor, arguments))
    real, fake = (r if isinstance(r, tuple) else (r,) for r in (real, fake))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@pytest.mark.parametrize(
    ("variant", "case", "stage"),
    with_stages(
        [
            *((v, "skipped") for v in VARIANTS),
            *(
                (v, c)
                for v in ("fp8_w8a8_block-block_shape(16,24)", "fp8_w8a8_tensor")
                for c in ("M0", "odd")
            ),
        ]
    ),
)
def test_out_overload(variant: str, case: str, stage: str) -> None:
    arguments = stage_inputs(make_quantized(VARIANTS[variant], **CASES[case]))[stage]
    expected = op(stage)(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    overload = getattr(torch.ops.compile_moe, stage).out
    names = [a.name for a in overload._schema.arguments if a.alias_info is not None]
    outs = {name: torch.zeros_like(e) for name, e in zip(names, expected, strict=True)}
    assert overload(*arguments, **outs) is None
    for out, e in zip(outs.values(), expected, strict=True):
        assert torch.equal(out.view(torch.uint8), e.view(torch.uint8))
    if variant in ONE_A_SCALING:
        opcheck(overload, arguments, outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "stage", ["quantized_gather_gemm", "quantized_scatter_gemm", "quantized_grouped_linear"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gemm_against_float64(variant: str, stage: str, dtype: torch.dtype) -> None:
    """Quantized operands are exact numbers: what is left is the rounding of the product, as plain PyTorch's."""
    q = make_quantized(VARIANTS[variant], M=40, biased=True, dtype=dtype)
    layer, scaling = q.layer, q.variant.made.token_scaling
    inputs = stage_inputs(q)[stage]
    tokens, scale = inputs[0].double(), inputs[1]
    if scaling is not None:
        tokens = tokens * scaling.expand(scale, tokens.size(1)).double()
    w, bias = (layer.w1, layer.w1_bias) if stage == "quantized_gather_gemm" else (layer.w2, layer.w2_bias)
    slots, offsets = sort_tokens_torch(layer.topk_ids, layer.w1.size(0))

    def reference(dtype: torch.dtype) -> Tensor:
        rows = tokens[slots.long() // 2] if stage == "quantized_gather_gemm" else tokens
        parts = [
            rows[offsets[e] : offsets[e + 1]].to(dtype) @ w[e].t().to(dtype) + bias[e].to(dtype)
            for e in range(w.size(0))
        ]
        out = torch.cat(parts)
        if stage == "quantized_gather_gemm":
            return layer.function(out)
        return (
            out
            if stage.endswith("linear")
            else torch.empty_like(out).index_copy(0, slots.long(), out).view(40, 2, -1)
        )

    exact = reference(torch.float64)
    result = op(stage)(*inputs)
    assert result.dtype is dtype and result.shape == exact.shape
    error, plain = ((r.double() - exact).norm() for r in (result, reference(dtype)))
    assert error <= 2 * (plain + torch.finfo(dtype).eps * exact.abs().max())


SCALINGS = [
    f"{d} per {p}"
    for d in ("float8_e4m3fn", "int8")
    for p in ("tensor", "token", "group of 16", "group of 7")
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_quantize_tokens(scaling: str) -> None:
    """Element by element, from the formula."""
    x = torch.randn(6, 40) * torch.tensor([1e-3, 1.0, 7.0, 1e4, 0.0, 2.0]).unsqueeze(1)
    quantized, scales = op("quantize_tokens")(x, scaling)
    kind, _, per = scaling.partition(" per ")
    largest = 448 if kind == "float8_e4m3fn" else 127
    width = 40 if per in ("tensor", "token") else int(per.split()[-1])
    for m in range(6):
        for k in range(40):
            group = x if per == "tensor" else x[m, k // width * width : (k // width + 1) * width]
            scale = max(group.abs().max().item() / largest, 2.0**-126)
            given = scales[0] if per == "tensor" else scales[m, k // width]
            assert given.item() == pytest.approx(scale, rel=1e-6)
            ratio = (x[m, k] / given).clamp(-largest, largest)
            expected = ratio.round() if kind == "int8" else ratio.to(torch.float8_e4m3fn).float()
            assert quantized[m, k].float() == expected


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_shares_a_scale_with_no_number_is_nan(scaling: str, value: float) -> None:
    x = torch.ones(3, 40)
    x[1, 2] = value
    quantized, scales = op("quantize_tokens")(x, scaling)
    parsed = parse_scaling(scaling)
    back = quantized.float() * parsed.expand(scales, 40)
    width = 40 if parsed.per != "group" else parsed.group_size
    affected = torch.zeros(3, 40, dtype=torch.bool)
    affected[1, :width] = True
    if parsed.per == "tensor":
        affected[:] = True
    assert back[affected].isnan().all()
    torch.testing.assert_close(back[~affected], x[~affected])


@pytest.mark.parametrize("variant", VARIANTS)
def test_grouped_linear_on_cuda_is_the_same_pytorch(variant: str) -> None:
    arguments = stage_inputs(make_quantized(VARIANTS[variant], biased=True))["quantized_grouped_linear"]
    launched = launch(torch.ops.compile_moe.quantized_grouped_linear.default, *arguments)
    assert torch.equal(launched, op("quantized_grouped_linear")(*arguments))


@pytest.mark.parametrize("stage", STAGES)
def test_backward_names_the_op_and_the_way_out(stage: str) -> None:
    arguments = list(stage_inputs(make_quantized(VARIANTS["int8_w8a16"]))[stage])
    arguments[0] = arguments[0].clone().requires_grad_()
    out = op(stage)(*arguments)
    out = out[1] if isinstance(out, tuple) else out
    with pytest.raises(
        NotImplementedError, match=rf"compile_moe::{stage} has no backward .*torch\.no_grad\(\)"
    ):
        out.sum().backward()


def test_tokens_of_no_one_say_so() -> None:
    x = make_layer(M=0).hidden_states
    for scaling in SCALINGS:
        quantized, scales = op("quantize_tokens")(x, scaling)
        assert quantized.shape == x.shape and torch.isfinite(scales).all()
