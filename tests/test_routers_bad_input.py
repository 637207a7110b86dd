"""Wrong arguments of the routers: the error says what was given and what is accepted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch._dynamo

from compile_moe.ops import route_and_sort_tokens, route_tokens
from compile_moe.routers import sigmoid_grouped_topk, softmax_topk, topk_softmax

ROUTERS = (softmax_topk, topk_softmax, sigmoid_grouped_topk)
#: Name: what differs from topk=2 of (3, 8) logits, the error, what its message says.
BAD_LOGITS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"router_logits": [[1.0, 2.0]]}, TypeError, "router_logits must be a tensor, got list"),
    "1d": ({"router_logits": torch.zeros(8)}, ValueError, "router_logits must be (M, E), got (8,)"),
    "3d": (
        {"router_logits": torch.zeros(1, 3, 8)},
        ValueError,
        "router_logits must be (M, E), got (1, 3, 8)",
    ),
    "int": (
        {"router_logits": torch.zeros(3, 8, dtype=torch.int64)},
        TypeError,
        "router_logits must be floating point, got torch.int64",
    ),
    "no-experts": ({"router_logits": torch.zeros(3, 0)}, ValueError, "topk must be 1 to E = 0"),
    "topk0": ({"topk": 0}, ValueError, "topk must be 1 to E = 8 (router_logits.size(1)), got 0"),
    "topk9": ({"topk": 9}, ValueError, "topk must be 1 to E = 8 (router_logits.size(1)), got 9"),
    "topk-float": ({"topk": 2.0}, TypeError, "topk must be an int, got float"),
    "topk-bool": ({"topk": True}, TypeError, "topk must be an int, got bool"),
}
BIAS_SHAPE = "correction_bias must be (E,) = (8,), got "
BAD_GROUPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bias-2d": ({"correction_bias": torch.zeros(8, 1)}, ValueError, BIAS_SHAPE + "(8, 1)"),
    "bias-of-4": ({"correction_bias": torch.zeros(4)}, ValueError, BIAS_SHAPE + "(4,)"),
    "bias-list": ({"correction_bias": [0.0] * 8}, TypeError, "correction_bias must be a tensor, got list"),
    "bias-int": (
        {"correction_bias": torch.zeros(8, dtype=torch.int32)},
        TypeError,
        "correction_bias must be floating point, got torch.int32",
    ),
    "bias-elsewhere": (
        {"correction_bias": torch.zeros(8, device="meta")},
        ValueError,
        "correction_bias must be on router_logits' device cpu, got meta",
    ),
    "3-groups": (
        {"num_expert_group": 3},
        ValueError,
        "num_expert_group must divide the number of experts E = 8 (router_logits.size(1)), got 3",
    ),
    "0-groups": ({"num_expert_group": 0}, ValueError, "E = 8 (router_logits.size(1)), got 0"),
    "float-groups": ({"num_expert_group": 2.0}, TypeError, "num_expert_group must be an int, got float"),
    "topk_group0": ({"topk_group": 0}, ValueError, "topk_group must be 1 to num_expert_group = 1, got 0"),
    "topk_group5": (
        {"num_expert_group": 4, "topk_group": 5},
        ValueError,
        "topk_group must be 1 to num_expert_group = 4, got 5",
    ),
    "topk_group-float": ({"topk_group": 1.0}, TypeError, "topk_group must be an int, got float"),
    "too-few-experts": (
        {"topk": 3, "num_expert_group": 4},
        ValueError,
        "topk = 3 experts don't fit into topk_group = 1 groups of 2 experts; raise topk_group or lower",
    ),
}
BAD_CALLS = {
    **{f"{router.__name__}-{name}": (router, bad) for router in ROUTERS for name, bad in BAD_LOGITS.items()},
    **{name: (sigmoid_grouped_topk, bad) for name, bad in BAD_GROUPS.items()},
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    router, (changes, error, message) = BAD_CALLS[name]
    with pytest.raises(error, match=re.escape(message)):
        router(**{"router_logits": torch.zeros(3, 8), "topk": 2, **changes})


#: Of the ops, which the routers' functions don't let happen.
BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "scoring": ({"scoring": "tanh"}, "scoring must be one of softmax, topk_softmax, sigmoid, got 'tanh'"),
    "bias": (
        {"scoring": "topk_softmax", "correction_bias": torch.zeros(8)},
        "correction_bias needs scoring='softmax' or 'sigmoid', got 'topk_softmax'; leave it out",
    ),
    "epsilon": ({"epsilon": -1.0}, "epsilon must be at least 0, got -1.0"),
    "excluded_score": ({"excluded_score": float("nan")}, "excluded_score must be a number or None, got NaN"),
    "groups": ({"num_expert_group": 2, "topk_group": 2}, "need scoring='sigmoid', got 'softmax'"),
}


@pytest.mark.parametrize("op", [route_tokens, route_and_sort_tokens], ids=str)
@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_of_the_op(name: str, op: torch._ops.OpOverload) -> None:
    changes, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        op(torch.zeros(3, 8), 2, **{"scoring": "softmax", **changes})
    with pytest.raises(TypeError, match=re.escape("router_logits must be one of torch.bfloat16, ")):
        op(torch.zeros(3, 8).to(torch.float8_e4m3fn), 2, "softmax")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("fullgraph", [False, True], ids=["with-graph-breaks", "fullgraph"])
def test_bad_input_when_compiled(fullgraph: bool) -> None:
    """The call falls back to eager for the error; where it must not, dynamo's own error quotes it."""
    compiled = torch.compile(softmax_topk, backend="eager", fullgraph=fullgraph)
    error = torch._dynamo.exc.Unsupported if fullgraph else ValueError
    with pytest.raises(error, match=re.escape("topk must be 1 to E = 8 (router_logits.size(1)), got 9")):
        compiled(torch.zeros(3, 8), 9)
