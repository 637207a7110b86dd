"""The kernels of one token, interpreted: every hostile layer's first token, out-of-bounds accesses raise."""

from __future__ import annotations

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "M0"])
def test_layer(case: str, dtype: torch.dtype) -> None:
    layer = make_layer(**CASES[case] | {"M": 1}, dtype=dtype)
    assert_as_accurate(run_layer(layer), layer)


@pytest.mark.parametrize("name", NAMES)
def test_activation(name: str) -> None:
    layer = make_layer(M=1, activation=name, dtype=torch.float32)
    assert_as_accurate(run_layer(layer), layer)


@pytest.mark.parametrize("topk", [1, 3, 10, 40])
def test_many_steps_and_any_number_of_experts(topk: int) -> None:
    layer = make_layer(M=1, E=41, K=530, I=290, topk=topk, dtype=torch.bfloat16)
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
    kept = run_layer(layer)
    layer.topk_ids[0, 1] = 2**40
    layer.topk_weights[0, 1] = 0
    alone = run_layer(layer)
    assert alone.isfinite().all()
    assert not torch.equal(alone, kept)


def test_parts_without_steps() -> None:
    """A depth of fewer steps than the parts that it is divided into, of weights whose columns lie in one piece."""
    layer = make_layer(**CASES["transposed"] | {"M": 1, "I": 150}, dtype=torch.bfloat16)
    assert_as_accurate(run_layer(layer), layer)
