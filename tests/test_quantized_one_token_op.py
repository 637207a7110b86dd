"""The op of one token in a quantized layer: results of its stages, and what it refuses or warns of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import compile_moe
from compile_moe.ops import quantized_one_token_experts
from tests.support.launchers import launch
from tests.support.oracle import CASES
from tests.support.quantized import VARIANTS, Variant, assert_as_accurate, make_quantized
from tests.support.quantized_inputs import stage_inputs
from tests.support.quantized_one_token import arguments_of, make

OP = "quantized_one_token_experts"
INT4, INT8, FP8 = Variant("int4_w4a16"), Variant("int8_w8a16"), Variant("fp8_w8a8_channel")
NARROW = Variant("int4_w4a16", (("group_size", 16),))


@pytest.mark.parametrize("case", ["M1", "odd", "mapped-int32-biased", "skipped", "ungated", "transposed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_result_of_the_stages(variant: str, case: str) -> None:
    q = make_quantized(VARIANTS[variant], **CASES[case] | {"M": 1})
    *given, _ = stage_inputs(q)[OP]
    expected = compile_moe.fused_experts(*q.args, **q.layer.options, quant_config=q.config())
    assert torch.equal(quantized_one_token_experts(*given), expected)
    assert_as_accurate(expected, q)


def test_result_of_rounded_weights() -> None:
    q = make_quantized(INT4, M=1, dtype=torch.bfloat16)
    given = list(stage_inputs(q)[OP])
    result = quantized_one_token_experts(*given)
    given[8], given[-1] = given[8].bfloat16(), False
    assert torch.equal(result, quantized_one_token_experts(*given))


def test_autocast_changes_nothing() -> None:
    given = stage_inputs(make_quantized(INT4, M=1))[OP]
    with torch.autocast("cpu", torch.bfloat16):
        result = quantized_one_token_experts(*given)
    assert result.dtype is torch.float32 and torch.equal(result, quantized_one_token_experts(*given))


def test_one_token_only() -> None:
    x, scale, *weights, router_weights, ids, scheme, dtype = stage_inputs(make_quantized(INT8))[OP][:12]
    two = [t.repeat(2, 1) for t in (x, router_weights, ids)]
    with pytest.raises(ValueError, match=r"must be one token \(1, K\), got \(2, 48\); call fused_experts"):
        quantized_one_token_experts(two[0], scale, *weights, *two[1:], scheme, dtype)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (INT4, {}),
        (NARROW, {"dtype": torch.bfloat16}),
        (INT8, {"dtype": torch.bfloat16, "transposed": True}),
        (FP8, {"dtype": torch.bfloat16, "transposed": True}),
    ],
    ids=["float32", "narrow groups", "columns", "columns, tokens quantized"],
)
def test_what_the_kernels_do_not_take(variant: Variant, options: dict[str, Any]) -> None:
    q = make_quantized(variant, M=1, K=128, I=128, **options)
    message = rf"compile_moe::{OP}: got .* {variant.scheme}.* accepted are 16-bit .*; call fused_experts"
    with pytest.raises(NotImplementedError, match=message):
        launch(quantized_one_token_experts, *stage_inputs(q)[OP])


@pytest.mark.parametrize(
    ("variant", "name"),
    [("int8_w8a16", "w1"), ("int8_w8a16", "w2"), ("int8_w8a8_channel", "hidden_states")],
)
def test_addresses_that_the_kernels_cannot_read(variant: str, name: str) -> None:
    """The stages compute the call, and say so."""
    q = make(variant, "plain")
    position = ("hidden_states", "", "w1", "", "", "w2").index(name)
    given = arguments_of(q, "cpu")
    tensor = given[position]
    shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)
    with pytest.warns(RuntimeWarning, match=f"{name} starts at no multiple of 4 bytes.* slower .*clone"):
        result = launch(quantized_one_token_experts, *arguments_of(q, "cpu", **{name: shifted}))
    assert torch.equal(result, quantized_one_token_experts(*given))
