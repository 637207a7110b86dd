"""Routers: from a score for each expert to the experts of each token and their weights.

One op, which on CUDA is one kernel; plain PyTorch where a gradient is asked for, or the experts are too many for it. M
tokens, E experts, topk experts per token; everything is computed in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compile_moe.ops.route_tokens import MAX_EXPERTS, check_routing, route_tokens, route_tokens_torch


class Routing(NamedTuple):
    """What a router chose: arguments of :func:`compile_moe.fused_experts`.

    topk_weights: (M, topk) float32. topk_ids: (M, topk) int64, best first.
    """

    topk_weights: Tensor
    topk_ids: Tensor


def softmax_topk(router_logits: Tensor, topk: int, *, renormalize: bool = False) -> Routing:
    """Softmax over all experts, then the topk largest (Mixtral, Qwen3-MoE, OLMoE).

    Args:
        router_logits: (M, E), floating point.
        topk: experts per token, 1 to E.
        renormalize: divide the chosen weights by their sum.

    Raises:
        ValueError, TypeError: arguments that don't fit together; the message says what is accepted.

    Example:
        >>> import torch
        >>> from compile_moe.routers import softmax_topk
        >>> topk_weights, topk_ids = softmax_topk(torch.tensor([[1.0, 3.0, 2.0]]), 2, renormalize=True)
        >>> topk_ids
        tensor([[1, 2]])
        >>> topk_weights
        tensor([[0.7311, 0.2689]])
    """
    return _route(router_logits, topk, "softmax", renormalize=renormalize)


def topk_softmax(router_logits: Tensor, topk: int) -> Routing:
    """The topk largest logits, then softmax over them (gpt-oss).

    The weights equal those of :func:`softmax_topk` with ``renormalize=True``.

    Args:
        router_logits: (M, E), floating point.
        topk: experts per token, 1 to E.

    Raises:
        ValueError, TypeError: arguments that don't fit together; the message says what is accepted.
    """
    return _route(router_logits, topk, "topk_softmax")


def sigmoid_grouped_topk(
    router_logits: Tensor,
    topk: int,
    *,
    correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> Routing:
    """Sigmoid scores, chosen with a correction bias within the best groups of experts (DeepSeek-V3).

    Experts form num_expert_group groups of consecutive ids. A group's score is the sum of its two best biased scores;
    tokens choose among the experts of their topk_group best groups, by biased scores. The weights are the scores
    without the bias.

    Args:
        router_logits: (M, E), floating point.
        topk: experts per token, 1 to topk_group groups' worth of experts.
        correction_bias: (E,), floating point, or None.
        num_expert_group: number of groups; divides E.
        topk_group: groups a token may choose from, 1 to num_expert_group.
        renormalize: divide the chosen weights by their sum.
        routed_scaling_factor: factor on the weights, after renormalization.

    Raises:
        ValueError, TypeError: arguments that don't fit together; the message says what is accepted.
    """
    return _route(
        router_logits,
        topk,
        "sigmoid",
        correction_bias,
        num_expert_group,
        topk_group,
        renormalize,
        routed_scaling_factor,
    )


def _route(
    router_logits: Tensor,
    topk: int,
    scoring: str,
    correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
) -> Routing:
    for name, value in (("topk", topk), ("num_expert_group", num_expert_group), ("topk_group", topk_group)):
        _check_int(name, value)
    options = (correction_bias, num_expert_group, topk_group, renormalize, routed_scaling_factor)
    # Here too, and not only in the op: an error of this code reaches the user from compiled code as it is.
    check_routing(router_logits, topk, scoring, *options)
    needs_grad = router_logits.requires_grad or (
        correction_bias is not None and correction_bias.requires_grad
    )
    use_op = not (torch.is_grad_enabled() and needs_grad) and router_logits.size(1) <= MAX_EXPERTS
    return Routing(*(route_tokens if use_op else route_tokens_torch)(router_logits, topk, scoring, *options))


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
