"""The kernels of one token, interpreted: every hostile layer's first token, out-of-bounds accesses raise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compile_moe.ops import one_token_experts
from compile_moe.ops.named_activations import NAMES
from tests.support.launchers import launch
from tests.support.one_token import arguments_of
from tests.support.oracle import CASES, Layer, assert_as_accurate, make_layer


def run_layer(layer: Layer) -> Tensor:
    out: Tensor = launch(one_token_experts, *arguments_of(layer))
    return out


# The same in bfloat16, but for what is loaded and rounded.
IN_BF16 = ("plain", "odd", "transposed-biased-swigluoai", "skipped-mapped", "weights-in-hidden-dtype")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES if case != "M0"),
        *((case, torch.bfloat16) for case in IN_BF16),
    ],
    ids=str,
)
def test_layer(case: str, dtype: torch.dtype) -> None:
    layer = make_layer(**CASES[case] | {"M": 1}, dtype=dtype)
    assert_as_accurate(run_layer(layer), layer)


@pytest.mark.parametrize("name", NAMES)
def test_activation(name: str) -> None:
    layer = make_layer(M=1, activation=name, dtype=torch.float32)
    assert_as_accurate(run_layer(layer), layer)


# Several steps of each kernel, and more experts than it has columns of; interpreted, each program takes its time.
@pytest.mark.parametrize(("topk", "K", "I"), [(1, 530, 290), (10, 270, 40), (40, 40, 70)])
def test_many_steps_and_any_number_of_experts(topk: int, K: int, I: int) -> None:
    layer = make_layer(M=1, E=41, K=K, I=I, topk=topk, dtype=torch.bfloat16)
    assert_as_accurate(run_layer(layer), layer)


def test_an_expert_chosen_twice() -> None:
    layer = make_layer(M=1, E=3, topk=2, dtype=torch.float32)
    layer.topk_ids.fill_(1)
    assert_as_accurate(run_layer(layer), layer)


def test_no_expert() -> None:
    layer = make_layer(M=1, dtype=torch.float32)
    layer.topk_ids.fill_(-1)
    assert torch.equal(run_layer(layer), torch.zeros_like(layer.hidden_states))


def test_ids_far_out_of_range() -> None:
    layer = make_layer(M=1, E=4, topk=2, dtype=torch.float32)
    results = []
    for skipped in (-1, 2**40, -(2**40), 2**32, 4):
        layer.topk_ids[0, 1] = skipped
        results.append(run_layer(layer))
    assert_as_accurate(results[0], layer)
    assert all(torch.equal(result, results[0]) for result in results)


def test_weights_are_rounded_on_request() -> None:
    layer = make_layer(M=1, dtype=torch.bfloat16)
    rounded = run_layer(replace(layer, topk_weights=layer.topk_weights.bfloat16()))
    assert torch.equal(launch(one_token_experts, *arguments_of(layer, round_weights=True)), rounded)
    assert not torch.equal(run_layer(layer), rounded)


def test_no_columns_between_the_gemms() -> None:
    layer = make_layer(M=1, dtype=torch.bfloat16)
    layer = replace(layer, w1=layer.w1[:, :0], w2=layer.w2[:, :, :0])
    assert torch.equal(run_layer(layer), torch.zeros_like(layer.hidden_states))
