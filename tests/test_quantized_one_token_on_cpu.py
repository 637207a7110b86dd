"""The kernels of one token on quantized weights, whose language has no interpreter, computed by torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from compile_moe.ops import quantize_tokens, quantized_one_token_experts
from tests.support.launchers import launch
from tests.support.one_token_on_cpu import kernels_launched, one_token_on_cpu
from tests.support.quantized import Quantized, assert_as_accurate
from tests.support.quantized_one_token import CASES, VARIANTS, arguments_of, make

TOKENS_QUANTIZED = [name for name, variant in VARIANTS.items() if variant.made.token_scaling is not None]
#: Slots and their parts of the depth in the second GEMM.
SEGMENTS = {"one expert": (1, 8), "two, deep": (2, 4), "plain": (2, 1), "eight": (8, 2), "sixteen": (16, 1)}


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    kernels_launched.clear()
    with one_token_on_cpu():
        yield


def run(quantized: Quantized, *args: Any, **options: Any) -> torch.Tensor:
    result: torch.Tensor = launch(
        quantized_one_token_experts, *arguments_of(quantized, "cpu", *args, **options)
    )
    assert [kernel for kernel, _ in kernels_launched[-2:]] == ["up_kernel", "down_kernel"]
    return result


#: Of those with other numbers of segments, in bytes; of the others one format each.
FORMATS = "mxfp4_w4a16", "fp8_w8a8_block", "int4, narrow groups"


@pytest.mark.parametrize("case", CASES)
def test_every_case(case: str) -> None:
    variant = "int8_w8a16" if case in SEGMENTS else FORMATS[list(CASES).index(case) % 3]
    made = make(variant, case)
    assert_as_accurate(run(made), made)
    if case in SEGMENTS:
        slots, parts = SEGMENTS[case]
        constants = kernels_launched[-1][1]
        assert (constants["SEGMENTS"], constants["PARTS"]) == (slots * parts, parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_format(variant: str) -> None:
    made = make(variant, "two, deep")
    assert_as_accurate(run(made), made)


@pytest.mark.parametrize("variant", ["int4, zero points", "int8_w8a16"])
def test_float16(variant: str) -> None:
    made = make(variant, "plain", dtype=torch.float16)
    assert_as_accurate(run(made), made)


def test_router_weights() -> None:
    """Rounded by the kernel as in front of it, or left out."""
    made = make("int8_w8a16", "biased, interleaved")
    rounded = made.layer.topk_weights.bfloat16().to(made.layer.topk_weights.dtype)
    in_front = run(made, topk_weights=rounded)
    assert torch.equal(run(made, round_weights=True), in_front) and not torch.equal(run(made), in_front)
    ones = torch.ones_like(rounded)
    assert torch.equal(run(made, apply_weights=False), run(made, topk_weights=ones))


@pytest.mark.parametrize("mapped", [False, True])
def test_ids_that_make_no_sense_lead_nowhere(mapped: bool) -> None:
    """Loads and stores outside a tensor fail here; such slots count as skipped."""
    made = make("int4, zero points", "plain", topk=4, biased=True, mapped=mapped)
    ids = torch.tensor([[2**40, -(2**40), -1, 2**31 - 1]])
    assert not run(made, topk_ids=ids).any()


def test_one_scale_for_all_rows_is_of_those_that_there_are(poison_empty: None) -> None:
    """Of skipped slots the rows between the GEMMs hold what was there before."""
    made = make("fp8_w8a8_tensor", "skipped")
    assert_as_accurate(run(made), made)
    made.layer.topk_ids.fill_(-1)
    assert not run(made).any()


@pytest.mark.parametrize("variant", TOKENS_QUANTIZED)
def test_rows_of_all_sizes(variant: str) -> None:
    """As the stages compute them, whose rows are quantized by themselves: rows between the GEMMs of 2^-20 to 2^8."""
    made = make(variant, "eight")
    sizes = 2.0 ** torch.linspace(-20, 8, 16)
    w1_scale = made.scales["w1_scale"] * sizes.view(-1, *[1] * (made.scales["w1_scale"].dim() - 1))
    arguments = arguments_of(made, "cpu", w1_scale=w1_scale)
    expected = quantized_one_token_experts(*arguments)
    result = launch(quantized_one_token_experts, *arguments)
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("value", [0.0, 1e-40, torch.inf, torch.nan])
@pytest.mark.parametrize("variant", TOKENS_QUANTIZED)
def test_special_tokens(variant: str, value: float) -> None:
    """As the stages compute them."""
    made = make(variant, "plain")
    x = made.args[0].clone()
    x[0, 3] = value
    if value == 0.0:
        x.zero_()
    tokens, scale = quantize_tokens(x, made.variant.made.token_scaling.text)
    arguments = arguments_of(made, "cpu", hidden_states=tokens, hidden_states_scale=scale)
    expected = quantized_one_token_experts(*arguments)
    result = launch(quantized_one_token_experts, *arguments)
    assert torch.equal(result.isfinite(), expected.isfinite())
    if expected.isfinite().all():
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())


def test_numbers_that_are_none_stay_in_their_rows() -> None:
    """A column that an expert has no number for has none, and others have; of skipped slots none counts."""
    made = make("int8_w8a16", "plain", topk=4)
    ids = torch.tensor([[3, -1, -1, -1]])
    one, others = made.q2.scale.clone(), made.q2.scale.clone()
    one[3, 5] = torch.nan
    others[[0, 1, 2, 4, 5, 6, 7]] = torch.nan
    assert run(made, topk_ids=ids, w2_scale=one).isnan().nonzero().tolist() == [[0, 5]]
    assert not run(made, topk_ids=ids, w2_scale=others).isnan().any()


def test_strides() -> None:
    """Of rows with room behind them, of scales that all experts share, of scales in float32."""
    made = make("int8_w8a16", "plain")
    w1 = made.q1.weight
    wide = torch.full((*w1.shape[:2], w1.size(2) + 32), 255, dtype=torch.uint8)[..., : w1.size(2)].copy_(w1)
    plain = run(made)
    assert torch.equal(run(made, w1=wide), plain)
    assert torch.equal(run(made, w1_scale=made.q1.scale.float()), plain)
    shared = made.q1.scale[:1].expand(8, -1)
    assert torch.equal(run(made, w1_scale=shared), run(made, w1_scale=shared.contiguous()))
