"""Routers against float64, against transformers' own, and compiled alone and with the layer."""

from __future__ import annotations

import doctest
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import compile_moe
from compile_moe import routers
from compile_moe.ops import route_and_sort_tokens, route_tokens, sort_tokens
from compile_moe.ops.route_tokens import MAX_EXPERTS
from compile_moe.routers import Routing, sigmoid_grouped_topk, softmax_topk, topk_softmax

E = 16
BIAS = torch.linspace(-0.3, 0.4, E)[torch.arange(E) * 7 % E]

#: Router and options.
CASES: dict[str, tuple[Callable[..., Routing], dict[str, Any]]] = {
    "softmax-topk4": (softmax_topk, {"topk": 4}),
    "softmax-topk4-renormalized": (softmax_topk, {"topk": 4, "renormalize": True}),
    "softmax-topk1": (softmax_topk, {"topk": 1, "renormalize": True}),
    "softmax-all": (softmax_topk, {"topk": E}),
    "topk4-softmax": (topk_softmax, {"topk": 4}),
    "topk1-softmax": (topk_softmax, {"topk": 1}),
    "sigmoid": (sigmoid_grouped_topk, {"topk": 3}),
    "sigmoid-bias": (sigmoid_grouped_topk, {"topk": 3, "correction_bias": BIAS}),
    "sigmoid-4groups": (sigmoid_grouped_topk, {"topk": 3, "num_expert_group": 4, "topk_group": 2}),
    "deepseek": (
        sigmoid_grouped_topk,
        {
            "topk": 5,
            "correction_bias": BIAS,
            "num_expert_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
    ),
    "sigmoid-groups-of-one": (
        sigmoid_grouped_topk,
        {"topk": 2, "correction_bias": BIAS, "num_expert_group": E, "topk_group": 3, "renormalize": False},
    ),
    "sigmoid-all-of-one-group": (
        sigmoid_grouped_topk,
        {"topk": 8, "num_expert_group": 2, "topk_group": 1, "renormalize": False},
    ),
}
COMPILED = ["softmax-topk4-renormalized", "topk4-softmax", "deepseek"]
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


@pytest.fixture(autouse=True)
def seed_of_its_own() -> None:
    """Sums of scores may come within a rounding of each other: not in these inputs."""
    torch.manual_seed(0)


def distinct_logits(num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(M, E): no two of a row are equal, in bfloat16 either, and none is another's negative."""
    levels = torch.rand(num_tokens, 64).argsort(-1)[:, :E] - 32
    return ((4 * levels + 1) / 32).to(dtype)


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}


def best(values: dict[int, float], number: int) -> list[int]:
    """Keys of the largest values, best first."""
    return sorted(values, key=lambda key: -values[key])[:number]


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(values)) for value in values]
    return [e / math.fsum(exponentials) for e in exponentials]


def expected_of_token(router: Callable[..., Routing], row: list[float], o: dict[str, Any]) -> Any:
    """Ids and weights of one token in Python's floats."""
    if router is topk_softmax:
        ids = best(dict(enumerate(row)), o["topk"])
        return ids, softmax([row[e] for e in ids])
    if router is softmax_topk:
        scores = softmax(row)
        ids = best(dict(enumerate(scores)), o["topk"])
    else:
        scores = [1 / (1 + math.exp(-value)) for value in row]
        bias = o["correction_bias"].tolist() if "correction_bias" in o else [0.0] * E
        biased = {e: scores[e] + bias[e] for e in range(E)}
        num_groups = o.get("num_expert_group", 1)
        members = {g: [e for e in range(E) if e * num_groups // E == g] for g in range(num_groups)}
        group_scores = {g: sum(sorted(biased[e] for e in members[g])[-2:]) for g in members}
        groups = best(group_scores, o.get("topk_group", 1))
        ids = best({e: biased[e] for g in groups for e in members[g]}, o["topk"])
    weights = [scores[e] for e in ids]
    if o.get("renormalize", router is sigmoid_grouped_topk):
        weights = [weight / math.fsum(weights) for weight in weights]
    return ids, [weight * o.get("routed_scaling_factor", 1.0) for weight in weights]


def assert_routing(routing: Routing, expected: tuple[Tensor, Tensor]) -> None:
    """Ids as expected (weights, ids); weights within a few roundings of float32."""
    assert (routing.topk_weights.dtype, routing.topk_ids.dtype) == (torch.float32, torch.int64)
    assert torch.equal(routing.topk_ids.cpu(), expected[1].cpu())
    torch.testing.assert_close(
        routing.topk_weights.cpu().double(), expected[0].cpu().double(), rtol=2e-6, atol=0
    )


@each_case
@each_dtype
def test_against_float64(case: str, dtype: torch.dtype, device: str) -> None:
    router, options = CASES[case]
    logits = distinct_logits(97, dtype)
    rows = [expected_of_token(router, row, options) for row in logits.tolist()]
    expected = torch.tensor([w for _, w in rows], dtype=torch.float64), torch.tensor([i for i, _ in rows])
    assert_routing(router(logits.to(device), **on(device, options)), expected)
    strided = logits.t().contiguous().t().to(device)
    assert_routing(router(strided, **on(device, options)), expected)


@each_case
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(case: str, num_tokens: int, device: str) -> None:
    router, options = CASES[case]
    logits, options = distinct_logits(7).to(device), on(device, options)
    routing, whole = router(logits[:num_tokens], **options), router(logits, **options)
    assert routing.topk_ids.shape == routing.topk_weights.shape == (num_tokens, options["topk"])
    assert_routing(routing, (whole.topk_weights[:num_tokens], whole.topk_ids[:num_tokens]))


@each_case
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9, 64, 65, 3000])
def test_with_the_sort_in_one_op(case: str, num_tokens: int, device: str) -> None:
    """Whatever number of kernels it takes: as from both ops, but that kernels on a GPU sum up in another order."""
    router, options = CASES[case]
    scoring = {softmax_topk: "softmax", topk_softmax: "topk_softmax", sigmoid_grouped_topk: "sigmoid"}[router]
    logits, options = distinct_logits(num_tokens).to(device), on(device, options)
    options.setdefault("renormalize", router is sigmoid_grouped_topk)
    weights, ids, slots, offsets = route_and_sort_tokens(logits, scoring=scoring, **options)
    expected = route_tokens(logits, scoring=scoring, **options)
    torch.testing.assert_close(weights, expected[0], rtol=1e-6 if device == "cuda" else 0.0, atol=0.0)
    assert torch.equal(ids, expected[1])
    expected = sort_tokens(ids, E)
    assert torch.equal(slots, expected[0]) and torch.equal(offsets, expected[1])


def ops_called(function: Callable[[], Any]) -> list[str]:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "compile_moe":
                called.append(op._opname)
            return op(*args, **(kwargs or {}))

    called: list[str] = []
    with Recorder():
        function()
    return called


@each_case
def test_one_op_unless_a_gradient_is_asked_for(case: str, device: str) -> None:
    router, options = CASES[case]
    logits, options = distinct_logits(5).to(device), on(device, options)
    assert ops_called(lambda: router(logits, **options)) == ["route_tokens"]
    logits.requires_grad_()
    with torch.no_grad():
        assert ops_called(lambda: router(logits, **options)) == ["route_tokens"]
    assert ops_called(lambda: router(logits, **options)) == []
    router(logits, **options).topk_weights.square().sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    if options.get("correction_bias") is not None:
        options["correction_bias"] = options["correction_bias"].clone().requires_grad_()
        assert ops_called(lambda: router(logits.detach(), **options)) == []


def test_more_experts_than_the_op_takes(device: str) -> None:
    logits = torch.randn(2, MAX_EXPERTS + 1, device=device)
    assert ops_called(lambda: softmax_topk(logits, 3)) == []
    with pytest.raises(ValueError, match=f"at most {MAX_EXPERTS} experts, got \\(2, {MAX_EXPERTS + 1}\\)"):
        route_tokens(logits, 3, "softmax")


TRANSFORMERS = {
    "mixtral": ("Mixtral", "num_local_experts", {}),
    "qwen3_moe": ("Qwen3Moe", "num_experts", {"norm_topk_prob": True}),
    "olmoe": ("Olmoe", "num_experts", {"norm_topk_prob": False}),
    "gpt_oss": ("GptOss", "num_local_experts", {}),
    "deepseek_v3": ("DeepseekV3", "n_routed_experts", {"n_group": 4, "topk_group": 2}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_against_transformers(family: str, dtype: torch.dtype) -> None:
    """Its router with the identity as weights, so that the hidden states are the logits."""
    transformers = pytest.importorskip("transformers")
    prefix, num_experts, own = TRANSFORMERS[family]
    config = getattr(transformers, f"{prefix}Config")(
        **{num_experts: E, "hidden_size": E, "num_experts_per_tok": 4, **own}
    )
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = f"{prefix}TopkRouter" if family == "deepseek_v3" else f"{prefix}TopKRouter"
    router = getattr(module, name)(config).to(dtype)
    torch.nn.init.eye_(router.weight)
    logits = distinct_logits(64, dtype)
    if family == "deepseek_v3":
        # transformers keeps this buffer in float32.
        router.e_score_correction_bias = BIAS
        options = {"num_expert_group": 4, "topk_group": 2, "correction_bias": BIAS}
        ours = sigmoid_grouped_topk(logits, 4, routed_scaling_factor=config.routed_scaling_factor, **options)
    elif family == "gpt_oss":
        torch.nn.init.zeros_(router.bias)
        ours = topk_softmax(logits, 4)
    else:
        ours = softmax_topk(logits, 4, renormalize=own.get("norm_topk_prob", True))
    with torch.no_grad():
        _, weights, ids = router(logits)
    # DeepSeek's order is that of topk(sorted=False).
    order, our_order = ids.argsort(-1), ours.topk_ids.argsort(-1)
    if family != "deepseek_v3":
        assert torch.equal(ids, ours.topk_ids)
    assert torch.equal(ids.gather(1, order), ours.topk_ids.gather(1, our_order))
    torch.testing.assert_close(
        ours.topk_weights.gather(1, our_order).to(weights.dtype), weights.gather(1, order)
    )


def test_topk_softmax_equals_renormalized_softmax_topk() -> None:
    logits = distinct_logits(33)
    assert_routing(topk_softmax(logits, 4), softmax_topk(logits, 4, renormalize=True))


def test_computes_in_float32_whatever_it_is_given() -> None:
    logits = distinct_logits(9, torch.float64) * (1 + 2**-40)
    for router, options in CASES.values():
        assert_routing(router(logits, **options), router(logits.float(), **options))


@each_case
def test_ties_choose_different_experts(case: str) -> None:
    router, options = CASES[case]
    weights, ids = router(torch.zeros(5, E), **options)
    assert all(len(set(row)) == options["topk"] for row in ids.tolist())
    assert (weights == weights[0, 0]).all()
    if router is topk_softmax or options.get("renormalize", router is sigmoid_grouped_topk):
        total = torch.full((5,), options.get("routed_scaling_factor", 1.0))
        torch.testing.assert_close(weights.sum(-1), total)


@each_case
def test_masked_experts_come_last_and_weigh_nothing(case: str) -> None:
    """A logit of -inf rules an expert out, unless its bias lifts it above others."""
    router, options = CASES[case]
    options = {**options, "correction_bias": None} if router is sigmoid_grouped_topk else options
    logits = distinct_logits(33)
    masked = torch.rand(33, E) < 0.4
    masked[:, ::8] = False
    weights, ids = router(logits.masked_fill(masked, -math.inf), **options)
    hidden = masked.gather(1, ids)
    assert (weights[hidden] == 0).all() and (weights[~hidden] > 0).all()
    # Best first: behind a masked expert only masked ones follow.
    assert torch.equal(hidden, hidden.int().cummax(-1).values.bool())
    if options.get("num_expert_group", 1) == 1:
        assert torch.equal(hidden.sum(-1), (options["topk"] - (~masked).sum(-1)).clamp(min=0))


@pytest.mark.parametrize("logit", [-200.0, -math.inf])
def test_sigmoids_of_zero_weigh_nothing(logit: float) -> None:
    weights, ids = sigmoid_grouped_topk(torch.full((3, E), logit), 4)
    assert torch.equal(weights, torch.zeros(3, 4))
    assert all(len(set(row)) == 4 for row in ids.tolist())


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("case", COMPILED)
def test_one_compile_for_all_token_counts(case: str, device: str) -> None:
    router, options = CASES[case]
    options = on(device, options)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(router, fullgraph=True, backend=counter)
    for num_tokens in (7, 2, 3, 16, 33, 64):
        logits = distinct_logits(num_tokens).to(device)
        torch._dynamo.mark_dynamic(logits, 0)
        routing, eager = compiled(logits, **options), router(logits, **options)
        assert isinstance(routing, Routing)
        assert_routing(routing, eager)
    assert counter.frame_count == 1


def layer_token_by_token(x: Tensor, w1: Tensor, w2: Tensor, routing: Routing) -> Tensor:
    """In float64."""
    x, w1, w2, weights = (t.double() for t in (x, w1, w2, routing.topk_weights))
    out = torch.zeros_like(x)
    for token, ids in enumerate(routing.topk_ids.tolist()):
        for slot, e in enumerate(ids):
            gate, up = (w1[e] @ x[token]).chunk(2)
            out[token] += weights[token, slot] * (w2[e] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("case", COMPILED)
def test_feeds_the_layer_in_one_graph(case: str, device: str) -> None:
    router, options = CASES[case]
    options = on(device, options)
    K, I = 24, 20
    w1 = (torch.randn(E, 2 * I, K) * K**-0.5).to(device)
    w2 = (torch.randn(E, K, I) * I**-0.5).to(device)

    def block(x: Tensor, logits: Tensor) -> Tensor:
        return compile_moe.fused_experts(x, w1, w2, *router(logits, **options))

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for num_tokens in (7, 2, 64):
        x, logits = torch.randn(num_tokens, K).to(device), distinct_logits(num_tokens).to(device)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(logits, 0)
        with torch.no_grad():
            result, eager = compiled(x, logits), block(x, logits)
        expected = layer_token_by_token(x, w1, w2, router(logits, **options)).float()
        torch.testing.assert_close(eager, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_docstrings() -> None:
    results = doctest.testmod(routers)
    assert results.attempted >= 4 and results.failed == 0
