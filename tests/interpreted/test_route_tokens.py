"""The router's kernels, interpreted: against plain PyTorch and float64, with ties, infinities and NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe.ops import route_and_sort_tokens, route_tokens
from compile_moe.ops.kernels import route_and_sort_tokens as kernels
from compile_moe.ops.kernels import sort_tokens as sort_kernels
from compile_moe.ops.route_tokens import route_tokens_torch
from compile_moe.ops.sort_tokens import sort_tokens_torch
from tests.support.launchers import launch

#: M, E, topk, scoring and options.
CASES: dict[str, tuple[int, int, int, str, dict[str, Any]]] = {
    "softmax": (5, 16, 4, "softmax", {}),
    "softmax-renormalized-scaled": (5, 16, 3, "softmax", {"renormalize": True, "routed_scaling_factor": 2.5}),
    "topk-softmax": (5, 32, 4, "topk_softmax", {}),
    "sigmoid": (5, 16, 3, "sigmoid", {}),
    "sigmoid-bias": (5, 16, 3, "sigmoid", {"correction_bias": True, "renormalize": True}),
    "one-expert": (3, 1, 1, "softmax", {"renormalize": True}),
    "two-experts-of-two": (3, 2, 2, "topk_softmax", {}),
    "odd-all-experts": (3, 7, 7, "softmax", {}),
    "odd-sigmoid": (9, 37, 5, "sigmoid", {"correction_bias": True}),
    "M0": (0, 16, 4, "softmax", {}),
    "M1": (1, 128, 8, "softmax", {"renormalize": True}),
    "many-experts-topk32": (2, 1000, 32, "softmax", {}),
    "deepseek": (
        3,
        256,
        8,
        "sigmoid",
        {"correction_bias": True, "num_expert_group": 8, "topk_group": 4, "renormalize": True},
    ),
    "odd-groups": (
        5,
        35,
        4,
        "sigmoid",
        {"correction_bias": True, "num_expert_group": 5, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "groups-of-one": (
        5,
        12,
        3,
        "sigmoid",
        {"num_expert_group": 12, "topk_group": 5, "correction_bias": True},
    ),
    "all-of-one-group": (5, 12, 4, "sigmoid", {"num_expert_group": 3, "topk_group": 1}),
    "softmax-bias": (5, 16, 3, "softmax", {"correction_bias": True, "routed_scaling_factor": 2.5}),
    "odd-softmax-bias": (5, 37, 5, "softmax", {"correction_bias": True, "renormalize": True}),
    "large-epsilon": (5, 16, 3, "sigmoid", {"renormalize": True, "epsilon": 0.5}),
    "softmax-large-epsilon": (5, 16, 3, "softmax", {"renormalize": True, "epsilon": 0.5}),
    "excluded-at-zero": (
        5,
        35,
        4,
        "sigmoid",
        {"correction_bias": -1.5, "num_expert_group": 5, "topk_group": 2, "excluded_score": 0.0},
    ),
    "excluded-at-a-negative-number": (
        5,
        32,
        4,
        "sigmoid",
        {"correction_bias": -1.5, "num_expert_group": 4, "topk_group": 1, "excluded_score": -0.75},
    ),
    "groups-that-limit-nothing": (5, 12, 4, "sigmoid", {"num_expert_group": 3, "topk_group": 3}),
}
each_case = pytest.mark.parametrize("case", CASES)
#: One for each scoring, with and without groups: for what the others have in common with these.
SOME = ("softmax-renormalized-scaled", "topk-softmax", "sigmoid-bias", "odd-groups", "excluded-at-zero")


def arguments_of(case: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Of the op: logits far enough apart that no rounding changes the choice."""
    m, num_experts, topk, scoring, options = CASES[case]
    levels = torch.rand(m, num_experts).argsort(-1).double()
    logits = (levels - num_experts / 2) * (8 / max(16, num_experts))
    bias = options.get("correction_bias")
    if bias is not None:
        bias = torch.rand(num_experts) + (0.0 if bias is True else bias)
    return (
        logits.to(dtype),
        topk,
        scoring,
        bias,
        options.get("num_expert_group", 1),
        options.get("topk_group", 1),
        options.get("renormalize", False),
        options.get("routed_scaling_factor", 1.0),
        options.get("epsilon", 1e-20),
        options.get("excluded_score"),
    )


def assert_routing(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(result[1], expected[1])
    torch.testing.assert_close(result[0].double(), expected[0].double(), rtol=2e-6, atol=0, equal_nan=True)


def in_float64(logits: Tensor, topk: int, scoring: str, *options: Any) -> tuple[Tensor, Tensor]:
    """Weights and ids by sorting, token by token."""
    bias, num_groups, topk_group, renormalize, scaling_factor, epsilon, excluded_score = options
    rows = []
    for row in logits.double():
        scores = row.sigmoid() if scoring == "sigmoid" else row.softmax(-1)
        choice = scores.clone() if bias is None else scores + bias.double()
        groups = choice.view(num_groups, -1)
        group_scores = groups.sort(-1, descending=True).values[:, :2].sum(-1)
        allowed = set(group_scores.argsort(descending=True)[:topk_group].tolist())
        candidates = [e for e in range(len(row)) if e // groups.size(1) in allowed]
        if excluded_score is not None:
            excluded = [e for e in range(len(row)) if e not in candidates]
            choice[excluded] = excluded_score
            candidates = list(range(len(row)))
        ids = sorted(candidates, key=lambda e: -choice[e].item())[:topk]
        weights = scores[ids]
        if renormalize or scoring == "topk_softmax":
            weights = weights / (weights.sum() + (epsilon if renormalize else 0))
        rows.append((weights * scaling_factor, torch.tensor(ids)))
    return torch.stack([w for w, _ in rows]), torch.stack([i for _, i in rows])


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, dtype) for case in SOME for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_route(case: str, dtype: torch.dtype) -> None:
    arguments = arguments_of(case, dtype)
    result = launch(route_tokens, *arguments)
    if dtype is torch.float32 or CASES[case][1] < 100:
        if arguments[-1] is None:
            # Excluded experts tie.
            assert_routing(result, route_tokens_torch(*arguments))
        if len(arguments[0]):
            assert_routing(result, in_float64(*arguments))
    else:
        # 16 bits can't tell so many experts apart.
        torch.testing.assert_close(result[0], route_tokens_torch(*arguments)[0])


@pytest.mark.parametrize("case", ["odd-groups", "softmax", "topk-softmax"])
def test_strided(case: str) -> None:
    logits, topk, scoring, bias, *options = arguments_of(case)
    expected = route_tokens_torch(logits, topk, scoring, bias, *options)
    if bias is not None:
        bias = torch.stack([bias, bias], -1)[:, 1]
    for strided in (logits.t().contiguous().t(), torch.cat([logits, logits], 1)[:, logits.size(1) :]):
        assert_routing(launch(route_tokens, strided, topk, scoring, bias, *options), expected)
    flipped = torch.stack([logits, logits + 1], 0)[:1, 1].expand(4, -1)
    assert_routing(
        launch(route_tokens, flipped, topk, scoring, bias, *options),
        route_tokens_torch(flipped.contiguous(), topk, scoring, bias, *options),
    )


def assert_a_choice_of_topk(result: tuple[Tensor, Tensor], arguments: tuple[Any, ...]) -> None:
    """Distinct ids within bounds, and the weights that torch has, whichever expert it gives them to."""
    weights, ids = result
    num_experts = arguments[0].size(1)
    assert ((ids >= 0) & (ids < num_experts)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    torch.testing.assert_close(weights, route_tokens_torch(*arguments)[0], equal_nan=True)


@each_case
def test_ties_go_to_the_lowest_id(case: str) -> None:
    logits, topk, scoring, _, *options = arguments_of(case)
    for value in (0.0, -3.0):
        arguments = torch.full_like(logits, value), topk, scoring, None, *options
        result = launch(route_tokens, *arguments)
        assert torch.equal(result[1], torch.arange(topk).expand_as(result[1]))
        assert_a_choice_of_topk(result, arguments)


def test_minus_zero_ties_with_zero() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]])
    assert launch(route_tokens, logits, 3, "topk_softmax")[1].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("case", [*SOME, "deepseek", "M1", "odd-all-experts"])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan], ids=str)
def test_not_finite(case: str, value: float) -> None:
    logits, topk, scoring, bias, *options = arguments_of(case)
    logits[torch.rand_like(logits) < 0.3] = value
    if len(logits) > 2:
        logits[0], logits[1], logits[1, -1] = value, 0.5, value
    arguments = logits, topk, scoring, bias, *options
    result = launch(route_tokens, *arguments)
    if options[0] == 1 or (value == -math.inf and options[-1] is None):
        assert_a_choice_of_topk(result, arguments)
    else:
        # Which group wins depends on ties of infinite sums, and who of the excluded on theirs: the ids must be ids.
        assert ((result[1] >= 0) & (result[1] < logits.size(1))).all()


def test_minus_infinity_comes_last() -> None:
    logits = torch.tensor([[-math.inf, 2.0, -math.inf, 1.0, 3.0]])
    weights, ids = launch(route_tokens, logits, 5, "softmax")
    assert ids.tolist() == [[4, 1, 3, 0, 2]]
    assert weights[0, 3:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("case", "path"),
    [
        *((case, "single") for case in CASES),
        *((case, path) for case in (*SOME, "M0") for path in ("few-slots", "many-slots")),
    ],
)
def test_route_and_sort(case: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path != "single":
        monkeypatch.setattr(kernels, "MAX_ELEMENTS", 0)
    if path == "many-slots":
        monkeypatch.setattr(sort_kernels, "SMALL_MAX_SLOTS", -1)
    arguments = arguments_of(case)
    weights, ids, slots, offsets = launch(route_and_sort_tokens, *arguments)
    expected = launch(route_tokens, *arguments)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    expected = sort_tokens_torch(ids, arguments[0].size(1))
    assert torch.equal(slots, expected[0]) and torch.equal(offsets, expected[1])


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 64, 65])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_route_and_sort_at_every_size_of_a_program(num_tokens: int, scoring: str) -> None:
    logits = torch.randn(num_tokens, 40)
    logits[num_tokens // 2] = math.nan
    _, ids, slots, offsets = launch(route_and_sort_tokens, logits, 3, scoring)
    expected = sort_tokens_torch(ids, 40)
    assert torch.equal(slots, expected[0]) and torch.equal(offsets, expected[1])
