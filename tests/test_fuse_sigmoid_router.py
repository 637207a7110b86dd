"""Routers with a bias or groups of experts, found in inductor's graph: those of DeepSeek-V3 and its relatives."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from compile_moe.lowering import fuse_router as passes
from compile_moe.lowering.fuse_router import fuse_router, fuse_router_and_sort
from compile_moe.ops import route_tokens, sort_tokens
from tests.support.fake_cuda import cuda_empty
from tests.support.router_graphs import (
    Router,
    assert_nothing_left_over,
    kernels_on_a_gpu,
    our_calls,
    reads_topk,
    traced,
)

E, TOPK = 32, 4


class Options(NamedTuple):
    """A router as one may write it."""

    scoring: str = "sigmoid"
    biased: bool = True
    groups: int = 1
    topk_group: int = 1
    filled: float | None = None  # None: no groups
    mask: str = "experts"  # what the mask is of: "experts", "members" of groups, "kept" experts
    epsilon: float | None = None  # None: not renormalized
    factor: float | None = None

    def __call__(self, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_scores(logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1), bias)

    def of_scores(self, scores: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        choice = scores + bias if self.biased else scores
        if self.filled is not None:
            choice = self.limited(choice)
        ids = choice.topk(TOPK, dim=-1, sorted=False).indices
        weights = scores.gather(1, ids)
        if self.epsilon is not None:
            weights /= weights.sum(-1, keepdim=True) + self.epsilon
        return weights if self.factor is None else weights * self.factor, ids

    def limited(self, choice: Tensor) -> Tensor:
        assert self.filled is not None
        grouped = choice.view(-1, self.groups, E // self.groups)
        group_scores = grouped.topk(2, dim=-1)[0].sum(dim=-1)
        best = group_scores.topk(self.topk_group, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(group_scores).scatter_(1, best, 1).unsqueeze(-1)
        if self.mask == "members":
            return grouped.masked_fill(~mask.bool(), self.filled).view(-1, E)
        of_experts = mask.expand(-1, self.groups, E // self.groups).reshape(-1, E).bool()
        if self.mask == "kept":
            return torch.where(of_experts, choice, self.filled)
        return choice.masked_fill(~of_experts, self.filled)


DEEPSEEK = Options("sigmoid", True, 4, 2, -math.inf, "experts", 1e-20, 2.5)


def random_options(seed: int) -> Options:
    pick = random.Random(seed).choice
    groups = pick([1, 2, 4, 8])
    limits = pick([True, True, False])
    return Options(
        scoring="sigmoid" if limits else pick(["sigmoid", "softmax"]),
        biased=pick([True, True, False]),
        groups=groups,
        topk_group=pick([n for n in (1, 2, 3, groups) if n <= groups and n * (E // groups) >= TOPK]),
        filled=pick([-math.inf, 0.0, -1.5, 0.7]) if limits else None,
        mask=pick(["experts", "members", "kept"]),
        epsilon=pick([None, 0.0, 1e-20, 1e-6, 0.5]),
        factor=pick([None, 1.0, 2.5]),
    )


def by_id(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """In an order that topk(sorted=False) doesn't leave open."""
    ids, order = ids.sort(-1)
    return weights.gather(1, order), ids


def assert_same_router(router: Router, *inputs: Any, tolerance: float = 1e-6) -> dict[str, Any]:
    """The graph becomes one op that computes what the router does; return the op's options."""
    module = traced(router, *inputs)
    fuse_router(module.graph, "cpu")
    module.graph.lint()
    module.recompile()
    assert our_calls(module) == [route_tokens]
    assert_nothing_left_over(module)
    (weights, ids), expected = module(*inputs), router(*inputs)
    assert (weights.dtype, ids.dtype) == (expected[0].dtype, expected[1].dtype)
    weights, ids = by_id(weights, ids)
    expected = by_id(*expected)
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close(weights, expected[0], rtol=tolerance, atol=0, equal_nan=True)
    (call,) = module.graph.find_nodes(op="call_function", target=route_tokens)
    return dict(call.kwargs)


@pytest.mark.parametrize(
    ("seed", "bias_dtype"),
    [*((seed, torch.float32) for seed in range(40)), *((seed, torch.bfloat16) for seed in range(0, 40, 4))],
)
def test_random_routers(seed: int, bias_dtype: torch.dtype) -> None:
    options = random_options(seed)
    for shift in (0.0, -0.8, 0.8):
        bias = (torch.randn(E) / 2 + shift).to(bias_dtype)
        assert_same_router(options, torch.randn(50, E) * 3, bias)


@pytest.mark.parametrize("filled", [0.0, -math.inf], ids=["zero", "minus-infinity"])
def test_filled_number_decides_over_negative_scores(filled: float) -> None:
    """With 0, experts outside of the best groups are chosen before those inside whose score is negative."""
    options = assert_same_router(DEEPSEEK._replace(filled=filled), torch.randn(50, E), -1 - torch.rand(E))
    assert options.get("excluded_score") == (0.0 if filled == 0.0 else None)


@pytest.mark.parametrize("epsilon", [None, 0.0, 1e-20, 1e-6])
def test_scores_that_vanish(epsilon: float | None) -> None:
    """All chosen sigmoids may be 0, or so small that epsilon counts."""
    logits = torch.randn(50, E) - torch.linspace(0, 120, 50)[:, None]
    assert_same_router(DEEPSEEK._replace(epsilon=epsilon), logits, torch.randn(E), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_cast_of_the_logits_is_the_ops(dtype: torch.dtype) -> None:
    logits, bias = torch.randn(50, E).to(dtype), torch.randn(E)
    module = traced(lambda x, b: DEEPSEEK(x.float(), b), logits, bias)
    fuse_router(module.graph, "cpu")
    assert [n.op for n in module.graph.nodes].count("call_function") == 3  # the op and its two results
    assert_same_router(lambda x, b: DEEPSEEK(x.float(), b), logits, bias)
    assert_same_router(lambda x, b: DEEPSEEK(x.float(), b.double().float()[None]), logits, bias)


def test_scores_of_16_bits() -> None:
    """The weights are rounded as before; experts are far enough apart for the choice."""
    logits = (torch.rand(50, E).argsort(-1) / 4 - 4).bfloat16()
    weights = Options(epsilon=1e-6, factor=2.5)
    options = assert_same_router(weights, logits, (torch.arange(E) % 2) * 8.0, tolerance=2**-6)
    assert not options["renormalize"]


def limited_by(group_scores: Tensor, choice: Tensor, scores: Tensor, interleaved: bool = False) -> Any:
    mask = torch.zeros_like(group_scores).scatter(1, group_scores.topk(2, dim=-1)[1], 1)
    if interleaved:
        mask = mask.unsqueeze(1).expand(-1, E // 4, 4).reshape(-1, E)
    else:
        mask = mask.unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
    ids = choice.masked_fill(~mask.bool(), -math.inf).topk(TOPK, dim=-1)[1]
    return scores.gather(1, ids), ids


def pair_sums(scores: Tensor) -> Tensor:
    return scores.view(-1, 4, E // 4).topk(2, dim=-1)[0].sum(dim=-1)


def sums_of_three(scores: Tensor, bias: Tensor) -> Any:
    choice = scores + bias
    return limited_by(choice.view(-1, 4, E // 4).topk(3, dim=-1)[0].sum(dim=-1), choice, scores)


def interleaved_groups(scores: Tensor, bias: Tensor) -> Any:
    choice = scores + bias
    return limited_by(choice.view(-1, E // 4, 4).topk(2, dim=1)[0].sum(dim=1), choice, scores)


def gathered(choice: Tensor, scores: Tensor, k: int = TOPK) -> tuple[Tensor, Tensor]:
    ids = choice.topk(k).indices
    return scores.gather(1, ids), ids


#: Routers that stay as they are, and what a refusal says.
LEFT: dict[str, tuple[Router, str]] = {
    "scores-returned": (lambda s, b: (s, *DEEPSEEK.of_scores(s, b)), "sigmoid is read by output, too"),
    "choice-returned": (lambda s, b: ((c := s + b), *gathered(c, s)), "add is read by output, too"),
    "mean-of-the-scores": (
        lambda s, b: (s.mean(0), *DEEPSEEK.of_scores(s, b)),
        "sigmoid is read by mean, too",
    ),
    "other-gather": (lambda s, b: (s.gather(1, b.long()[None]), *gathered(s + b, s)), "is read by gather"),
    "biased-weights": (lambda s, b: gathered((c := s + b), c), "add is read by gather, too"),
    "biased-values": (lambda s, b: (s + b).topk(TOPK), "no score without the bias"),
    "values-of-the-excluded": (
        lambda s, b: DEEPSEEK._replace(filled=0.0).limited(s).topk(TOPK),
        "outside of the groups",
    ),
    "sums-of-three": (sums_of_three, "is no sum of the two best"),
    "best-of-a-group": (
        lambda s, b: limited_by((c := s + b).view(-1, 4, E // 4).amax(-1), c, s),
        "is no sum of the two best",
    ),
    "groups-of-the-unbiased": (lambda s, b: limited_by(pair_sums(s), s + b, s), "groups are of other scores"),
    "interleaved-groups": (interleaved_groups, "along dimension 1"),
    "interleaved-mask": (
        lambda s, b: limited_by(pair_sums(c := s + b), c, s, interleaved=True),
        "spreads groups over experts that are not consecutive",
    ),
    "other-mask": (
        lambda s, b: gathered((s + b).masked_fill(b > 1, -math.inf), s),
        "not to groups that a topk chose",
    ),
    "inverted-mask": (
        lambda s, b: gathered((c := s + b).where(DEEPSEEK.limited(c) == -math.inf, 0.0), s),
        "not to groups that a topk chose",
    ),
    "too-many-for-the-groups": (
        lambda s, b: gathered(DEEPSEEK._replace(topk_group=1).limited(s + b), s, 9),
        "more than there are in the chosen groups",
    ),
    "bias-of-tokens": (lambda s, b: gathered(s + s.flip(0), s), "is no bias (E,)"),
    "number-as-a-bias": (lambda s, b: gathered(s + 1.0, s), "is no bias (E,)"),
    "bias-times-alpha": (lambda s, b: gathered(torch.add(s, b, alpha=2), s), "is no softmax or sigmoid"),
    "scores-of-float64": (lambda s, b: gathered(s.double().sigmoid() + b, s), "in float64"),
    "bias-in-float64": (lambda s, b: gathered(s + b.double(), s), "in float64"),
    "over-tokens": (lambda s, b: (s + b).topk(TOPK, dim=0).indices, "along dimension 0"),
    "smallest": (lambda s, b: (s + b).topk(TOPK, largest=False).indices, "largest=False"),
}
#: The same, of logits.
LEFT_OF_LOGITS: dict[str, tuple[Router, str]] = {
    "softmax-in-groups": (DEEPSEEK._replace(scoring="softmax"), "limits softmax scores to groups"),
    "sigmoid-of-the-chosen": (
        lambda x, b: ((chosen := x.topk(TOPK)).values.sigmoid(), chosen.indices),
        "no softmax follows",
    ),
    "chosen-by-biased-logits": (
        lambda x, b: ((chosen := gathered(x + b, x))[0].sigmoid(), chosen[1]),
        "is no softmax or sigmoid",
    ),
}


@pytest.mark.parametrize("name", [*LEFT, *LEFT_OF_LOGITS])
def test_stays(name: str) -> None:
    if name in LEFT:
        of_scores, reason = LEFT[name]
        module = traced(lambda x, b: of_scores(x.sigmoid(), b), torch.randn(50, E), torch.randn(E))
    else:
        router, reason = LEFT_OF_LOGITS[name]
        module = traced(router, torch.randn(50, E), torch.randn(E))
    before = [node.target for node in module.graph.nodes]
    passes.refusals.clear()
    fuse_router(module.graph, "cpu")
    assert [node.target for node in module.graph.nodes] == before
    assert any(reason in refusal for refusal in passes.refusals), passes.refusals


def test_another_reader_of_the_weights() -> None:
    """They are the op's weights then, and what follows stays."""

    def router(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        weights, ids = Options()(x, bias)
        return weights, weights / weights.sum(-1, keepdim=True) * 2.5, ids

    module = traced(router, *(inputs := (torch.randn(50, E), torch.randn(E))))
    fuse_router(module.graph, "cpu")
    module.recompile()
    assert our_calls(module) == [route_tokens]
    weights, scaled, ids = module(*inputs)
    expected = router(*inputs)
    for result, e in ((weights, expected[0]), (scaled, expected[1])):
        torch.testing.assert_close(by_id(result, ids), by_id(e, expected[2]), rtol=1e-6, atol=0)


def test_layers_share_constants() -> None:
    def two_layers(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        first = DEEPSEEK(x, bias)
        return *first, *DEEPSEEK(x + first[0].sum(-1, keepdim=True), bias)

    module = traced(two_layers, torch.randn(50, E), torch.randn(E))
    fuse_router(module.graph, "cpu")
    module.graph.lint()
    assert our_calls(module) == [route_tokens] * 2
    assert_nothing_left_over(module)


def gpu_arguments() -> tuple[Tensor, ...]:
    return cuda_empty(48, E, dtype=torch.bfloat16), cuda_empty(E, dtype=torch.float32)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 1), (4, 2), (4, 4)], ids=str)
def test_one_kernel_on_a_gpu(groups: tuple[int, int], dynamic: bool) -> None:
    """With the token sort, too."""
    router = DEEPSEEK._replace(groups=groups[0], topk_group=groups[1])

    def route_and_sort(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        weights, ids = router(x.float(), bias)
        return weights, *sort_tokens(ids, E)

    kernels = kernels_on_a_gpu(route_and_sort, gpu_arguments, dynamic_dims=[(0, 0)] if dynamic else [])
    assert passes.refusals == []
    assert (kernels.triton_kernels, kernels.op_calls) == ([], ["route_and_sort_tokens"])
    assert not reads_topk(kernels)


def test_sort_keeps_the_options() -> None:
    def route_and_sort(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        weights, ids = DEEPSEEK._replace(filled=0.0, epsilon=0.5)(x, bias)
        return weights, ids, *sort_tokens(ids, E)

    inputs = torch.randn(50, E), -torch.rand(E)
    module = traced(route_and_sort, *inputs)
    fuse_router(module.graph, "cpu")
    fuse_router_and_sort(module.graph)
    module.recompile()
    assert [str(call) for call in our_calls(module)] == ["compile_moe.route_and_sort_tokens.default"]
    results, expected = module(*inputs), route_and_sort(*inputs)
    torch.testing.assert_close(by_id(*results[:2]), by_id(*expected[:2]), rtol=1e-6, atol=0)
    assert torch.equal(results[3], expected[3])
