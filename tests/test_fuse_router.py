"""Routers found in inductor's graph: on a GPU that is not there by their code, on the CPU by their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe
from compile_moe import routers
from compile_moe.lowering import fuse_router as passes
from compile_moe.lowering.fuse_router import fuse_router, fuse_router_and_sort
from compile_moe.ops import route_tokens, sort_tokens
from tests.support.fake_cuda import cuda_empty
from tests.support.router_graphs import (
    Router,
    assert_nothing_left_over,
    kernels_on_a_gpu,
    on_a_gpu,
    our_calls,
    reads_topk,
    traced,
)

E, TOPK = 16, 4


def softmax_topk(
    logits: Tensor, dtype: torch.dtype | None = torch.float32, k: int = TOPK
) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=dtype), k, dim=-1)
    return weights, ids


def renormalized(logits: Tensor, epsilon: float | None = None) -> tuple[Tensor, Tensor]:
    weights, ids = softmax_topk(logits)
    total = weights.sum(-1, keepdim=True)
    return weights / (total if epsilon is None else total + epsilon), ids


def topk_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = torch.topk(logits, TOPK, dim=-1)
    return F.softmax(values, dim=1, dtype=values.dtype), ids


FOUND: dict[str, Router] = {
    "softmax-topk": softmax_topk,
    "in-the-dtype-of-the-logits": lambda x: softmax_topk(x, None),
    "cast-before": lambda x: softmax_topk(x.float()),
    "unsorted": lambda x: [t.sort(-1).values for t in x.float().softmax(1).topk(TOPK, 1, sorted=False)],
    "ids-only": lambda x: softmax_topk(x)[1],
    "weights-only": lambda x: softmax_topk(x)[0],
    "renormalized": renormalized,
    "renormalized-with-epsilon": lambda x: renormalized(x, 1e-20),
    "renormalized-with-a-large-epsilon": lambda x: renormalized(x, 1e-3),
    "renormalized-and-cast": lambda x: (renormalized(x)[0].to(x.dtype), renormalized(x)[1]),
    "both-weights": lambda x: (softmax_topk(x)[0], *renormalized(x)),
    "logits-returned": lambda x: (*softmax_topk(x.float()), x.float()),
    "topk-softmax": topk_softmax,
    "float-topk-softmax": lambda x: topk_softmax(x.float()),
    "gathered": lambda x: (i := (p := x.float().softmax(1)).topk(TOPK).indices, p.gather(1, i)),
    "gathered-logits": lambda x: (i := x.float().softmax(1).topk(TOPK).indices, x.gather(1, i).sigmoid()),
    "scaled": lambda x: ((w := softmax_topk(x))[0] * 2.5, w[1]),
    "renormalized-and-scaled": lambda x: (16 * (w := renormalized(x, 1e-6))[0], w[1]),
    "scaled-twice": lambda x: ((w := softmax_topk(x))[0] * 2.5, w[0] * 0.5, w[1]),
    "sum-returned": lambda x: (
        (w := softmax_topk(x))[0] / (t := w[0].sum(-1, keepdim=True)),
        t,
        w[1],
    ),
    "all-experts": lambda x: softmax_topk(x, k=E),
    "in-sequences": lambda x: renormalized(x.view(3, -1, E)),
    "in-sequences-and-flattened": lambda x: [t.view(-1, TOPK) for t in renormalized(x.view(3, -1, E))],
    "topk-softmax-in-sequences": lambda x: (
        (chosen := x.view(3, -1, E).topk(TOPK)).values.float().softmax(-1),
        chosen.indices,
    ),
    "in-sequences-of-blocks": lambda x: softmax_topk(x.view(3, 1, -1, E).float()),
    "gathered-in-sequences": lambda x: (
        i := (p := x.view(3, -1, E).float().sigmoid()).topk(TOPK).indices,
        p.gather(-1, i),
    ),
}


def other_reader_of_chosen_logits(logits: Tensor) -> tuple[Tensor, ...]:
    values, ids = torch.topk(logits, TOPK, dim=-1)
    return F.softmax(values, dim=-1), ids, values


#: Routers that stay as they are, and what the refusal says.
LEFT: dict[str, tuple[Router, str]] = {
    "probabilities-returned": (
        lambda x: ((p := x.float().softmax(-1)), *p.topk(TOPK)),
        "div is read by output, too",
    ),
    "exponentials-read": (
        lambda x: (
            (e := (x.float() - x.float().amax(-1, True)).exp()).mean(),
            (e / e.sum(-1, True)).topk(TOPK),
        ),
        "exp is read by",
    ),
    "smallest": (lambda x: x.float().softmax(-1).topk(TOPK, largest=False), "largest=False"),
    "topk-over-tokens": (lambda x: x.float().softmax(-1).topk(TOPK, dim=0), "along dimension 0"),
    "softmax-over-tokens": (lambda x: x.float().softmax(0).topk(TOPK), "is no softmax"),
    "no-softmax": (lambda x: x.float().relu().topk(TOPK), "is no softmax"),
    "topk-softmax-over-tokens": (lambda x: x.topk(TOPK).values.softmax(0), "no softmax follows"),
    "chosen-logits-returned": (other_reader_of_chosen_logits, "getitem is read by output, too"),
    "float64": (lambda x: ((c := x.double().topk(TOPK)).values.float().softmax(-1), c.indices), "in float64"),
    "softmax-in-float64": (lambda x: x.double().softmax(-1).topk(TOPK), "is no softmax"),
    "weighted-probabilities": (lambda x: (x.float().softmax(-1) * x[:, :1]).topk(TOPK), "is no softmax"),
    "softmax-over-a-sequence": (lambda x: x.view(2, -1, E).float().softmax(1).topk(TOPK), "is no softmax"),
    "one-token": (lambda x: x[0].float().softmax(-1).topk(TOPK), "its input has 1 dimensions"),
    "sum-of-something-else": (
        lambda x: ((x - x.amax(-1, True)).exp() / x.exp().sum(-1, True)).topk(TOPK),
        "is no softmax",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["softmax-topk", "renormalized", "renormalized-with-epsilon", "cast-before"])
def test_becomes_one_op(name: str, dtype: torch.dtype) -> None:
    kernels = on_a_gpu(FOUND[name], 48, E, dtype=dtype)
    assert (kernels.triton_kernels, kernels.extern_calls) == (
        [],
        ["torch.ops.compile_moe.route_tokens.default"],
    )
    assert passes.refusals == []


def test_dynamic_number_of_tokens() -> None:
    kernels = on_a_gpu(FOUND["renormalized"], 48, E, dynamic_dims=[(0, 0)])
    assert (kernels.triton_kernels, kernels.op_calls) == ([], ["route_tokens"])


@pytest.mark.parametrize("name", LEFT)
def test_stays(name: str) -> None:
    router, reason = LEFT[name]
    kernels = on_a_gpu(router, 48, E, dtype=torch.float32)
    assert kernels.op_calls == [] and reads_topk(kernels)
    assert len(passes.refusals) == 1 and reason in passes.refusals[0], passes.refusals


def test_many_classes_stay() -> None:
    """Sampling from a vocabulary is no routing."""
    kernels = on_a_gpu(softmax_topk, 4, 32000)
    assert kernels.op_calls == [] and "32000 experts are more than" in passes.refusals[0]


def test_cpu_stays() -> None:
    graph = traced(softmax_topk, torch.randn(3, E)).graph
    before = len(graph.nodes)
    passes.refusals.clear()
    fuse_router(graph)
    assert len(graph.nodes) == before
    assert len(passes.refusals) == 1
    assert "it is on cpu; route_tokens saves kernels on cuda only" in passes.refusals[0]


@pytest.mark.parametrize("dims", ["dynamic", "unbacked"])
def test_sequences_of_a_block(dims: str) -> None:
    """What the layer flattens behind its router is one op with the sort, for every batch and length."""

    def block(x: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        weights, ids = renormalized(F.linear(x, gate))
        return weights, *sort_tokens(ids.view(-1, TOPK), E)

    kernels = kernels_on_a_gpu(
        block,
        lambda: (cuda_empty(2, 17, 64), cuda_empty(E, 64)),
        **{f"{dims}_dims": [(0, 0), (0, 1)]},
    )
    assert passes.refusals == [] and kernels.triton_kernels == []
    assert kernels.extern_calls[0] == "extern_kernels.mm" and kernels.op_calls == ["route_and_sort_tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cast_of_the_weights_costs_no_kernel(dtype: torch.dtype) -> None:
    """A layer behind a router in the style of Qwen3-MoE: router and sort, two GEMMs, finalize with the cast, if any."""

    def block(x: Tensor, logits: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        weights, ids = renormalized(logits)
        return compile_moe.fused_experts(x, w1, w2, weights.to(dtype), ids)

    def make_arguments() -> tuple[Tensor, ...]:
        shapes = (48, 64), (48, E), (E, 64, 64), (E, 64, 32)
        return tuple(cuda_empty(*shape, dtype=dtype) for shape in shapes)

    kernels = kernels_on_a_gpu(block, make_arguments)
    stages = ["route_and_sort_tokens", "gather_gemm", "scatter_gemm"]
    is_cast = dtype is not torch.float32
    assert kernels.op_calls == stages + ["weight_and_reduce"] * (not is_cast)
    assert len(kernels.triton_kernels) == is_cast and len(kernels.extern_calls) == len(kernels.op_calls)


OURS: dict[str, Callable[[Tensor], Any]] = {
    "softmax_topk": lambda x: routers.softmax_topk(x, TOPK, renormalize=True),
    "topk_softmax": lambda x: routers.topk_softmax(x, TOPK),
    "sigmoid_grouped_topk": lambda x: routers.sigmoid_grouped_topk(x, TOPK, num_expert_group=4, topk_group=2),
}


@pytest.mark.parametrize("name", OURS)
def test_our_routers_and_the_sort_are_one_op(name: str) -> None:
    def route_and_sort(x: Tensor) -> tuple[Tensor, ...]:
        weights, ids = OURS[name](x)
        return weights, ids, *sort_tokens(ids, E)

    kernels = on_a_gpu(route_and_sort, 48, E)
    assert (kernels.triton_kernels, kernels.op_calls) == ([], ["route_and_sort_tokens"])


SORTS_THAT_STAY: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], str]] = {
    "other-number": (
        lambda ids: sort_tokens(ids, E + 1),
        "it sorts by 17 experts, the router chooses from 16",
    ),
    "expert-map": (
        lambda ids: sort_tokens(ids, E, torch.arange(E, device=ids.device)),
        "an expert_map sends ids to local experts",
    ),
    "changed-ids": (lambda ids: sort_tokens(ids - 1, E), "its ids are not those chosen, but sub"),
}


@pytest.mark.parametrize("case", SORTS_THAT_STAY)
def test_sorts_of_something_else_stay(case: str) -> None:
    sort, reason = SORTS_THAT_STAY[case]
    kernels = on_a_gpu(lambda x: sort(route_tokens(x, TOPK, "softmax")[1]), 48, E)
    assert kernels.op_calls == ["route_tokens", "sort_tokens"]
    # The library's own passes run behind the test's.
    (refusal,) = set(passes.refusals)
    assert refusal.startswith(f"sort_tokens behind a router: {reason}")


def test_a_sort_of_given_ids_is_no_refusal() -> None:
    kernels = kernels_on_a_gpu(
        lambda ids: sort_tokens(ids, E), lambda: (cuda_empty(48, TOPK, dtype=torch.int64),)
    )
    assert kernels.op_calls == ["sort_tokens"] and passes.refusals == []


def assert_same_results(function: Router, logits: Tensor, ops: list[Any], *functions: Any) -> None:
    """The rewritten graph calls ``ops`` and computes what the function does, in its dtypes."""
    module = traced(function, logits)
    for graph_pass in functions:
        graph_pass(module.graph)
    module.graph.lint()
    module.recompile()
    assert our_calls(module) == ops
    results, expected = module(logits), function(logits)
    results, expected = ((r,) if isinstance(r, Tensor) else r for r in (results, expected))
    for result, e in zip(results, expected, strict=True):
        assert (result.dtype, result.shape) == (e.dtype, e.shape)
        # The unfused one rounds in between.
        torch.testing.assert_close(result, e, rtol=1e-6 if logits.dtype is torch.float32 else 2**-7, atol=0)
    assert_nothing_left_over(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FOUND)
def test_results(name: str, dtype: torch.dtype) -> None:
    # Far enough apart that no two probabilities are equal in bfloat16.
    logits = (torch.rand(33, E).argsort(-1) / 2 - 3).to(dtype)
    calls = 2 if name in ("renormalized-and-cast", "both-weights") else 1
    assert_same_results(
        FOUND[name],
        logits,
        [torch.ops.compile_moe.route_tokens.default] * calls,
        lambda g: fuse_router(g, "cpu"),
    )


@pytest.mark.parametrize("cast", [torch.int64, torch.int32], ids=str)
def test_results_with_the_sort(cast: torch.dtype) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        weights, ids = renormalized(x)
        return weights, ids, *sort_tokens(ids.to(cast), E)

    assert_same_results(
        function,
        (torch.rand(9, E).argsort(-1) / 2 - 3),
        [torch.ops.compile_moe.route_and_sort_tokens.default],
        lambda g: fuse_router(g, "cpu"),
        fuse_router_and_sort,
    )
