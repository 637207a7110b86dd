"""Router and token sort: ``route_tokens`` and then ``sort_tokens`` of its ids over all E experts.

Args: those of ``route_tokens``.

Returns:
    topk_weights (M, topk) float32 and topk_ids (M, topk) int64, as from ``route_tokens`` but for the order of sums.
    sorted_slots (S,) int32 and expert_offsets (E + 1,) int32, as from ``sort_tokens(topk_ids, E)``.

On CUDA one kernel does both for few tokens; which, the op decides when it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compile_moe.ops.kernels import route_and_sort_tokens as kernels
from compile_moe.ops.problem_size import require, shape
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.ops.route_tokens import ARGUMENTS, check_expert_count, check_routing, route_tokens_torch
from compile_moe.ops.sort_tokens import sort_tokens_torch


def _check(router_logits: Tensor, topk: int, scoring: str, *rest: Any, **options: Any) -> None:
    check_routing(router_logits, topk, scoring, *rest, **options)
    check_expert_count(router_logits)
    require(
        router_logits.size(0) * topk < 2**31 - 1,
        lambda: (
            f"router_logits {shape(router_logits)} and topk = {topk} make 2^31 slots or more; split the tokens"
        ),
    )


def _outputs(router_logits: Tensor, topk: int, *rest: Any, **options: Any) -> tuple[OutputSpec, ...]:
    m, num_experts = router_logits.shape
    return (
        ((m, topk), torch.float32),
        ((m, topk), torch.int64),
        ((m * topk,), torch.int32),
        ((num_experts + 1,), torch.int32),
    )


def _torch(router_logits: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, ids = route_tokens_torch(router_logits, *rest, **options)
    return weights, ids, *sort_tokens_torch(ids, router_logits.size(1))


def _launch(outputs: tuple[Tensor, Tensor, Tensor, Tensor], *arguments: Any) -> None:
    kernels.route_and_sort_tokens(*outputs, *arguments)


route_and_sort_tokens = define_op(
    "route_and_sort_tokens",
    ARGUMENTS,
    ("topk_weights", "topk_ids", "sorted_slots", "expert_offsets"),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
