"""Routers: from a score for each expert to the experts of each token and their weights.

Plain PyTorch, so that inductor compiles them into the graph around the layer. M tokens, E experts, topk experts per
token; everything is computed in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compile_moe.ops.problem_size import require_tensors, shape


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
    _check(router_logits, topk)
    weights, ids = router_logits.softmax(-1, dtype=torch.float32).topk(topk)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(weights, ids)


def topk_softmax(router_logits: Tensor, topk: int) -> Routing:
    """The topk largest logits, then softmax over them (gpt-oss).

    The weights equal those of :func:`softmax_topk` with ``renormalize=True``.

    Args:
        router_logits: (M, E), floating point.
        topk: experts per token, 1 to E.

    Raises:
        ValueError, TypeError: arguments that don't fit together; the message says what is accepted.
    """
    _check(router_logits, topk)
    logits, ids = router_logits.float().topk(topk)
    return Routing(logits.softmax(-1), ids)


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
    _check(router_logits, topk)
    group_size = _check_groups(router_logits.size(1), topk, num_expert_group, topk_group)
    scores = router_logits.float().sigmoid()
    choice = scores
    if correction_bias is not None:
        _check_bias(correction_bias, router_logits)
        choice = scores + correction_bias.float()
    if topk_group < num_expert_group:
        groups = choice.unflatten(1, (num_expert_group, group_size))
        group_scores = groups.topk(min(2, group_size)).values.sum(-1)
        best = group_scores.topk(topk_group).indices
        chosen = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
        choice = groups.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(topk).indices
    weights = scores.gather(1, ids)
    if renormalize:
        # Sigmoids of very negative logits are 0 in float32: keep such rows zero instead of NaN.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(weights * routed_scaling_factor, ids)


# Plain raises: dynamo traces them with any message, torch._check only with constants in the message.


def _check(router_logits: Tensor, topk: int) -> None:
    require_tensors(router_logits=router_logits)
    if router_logits.dim() != 2:
        raise ValueError(f"router_logits must be (M, E), got {shape(router_logits)}")
    if not router_logits.is_floating_point():
        raise TypeError(f"router_logits must be floating point, got {router_logits.dtype}")
    _check_int("topk", topk)
    num_experts = router_logits.size(1)
    if not 1 <= topk <= num_experts:
        raise ValueError(f"topk must be 1 to E = {num_experts} (router_logits.size(1)), got {topk}")


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def _check_groups(num_experts: int, topk: int, num_expert_group: int, topk_group: int) -> int:
    """Experts of a group, if the groups are possible."""
    _check_int("num_expert_group", num_expert_group)
    _check_int("topk_group", topk_group)
    if num_expert_group < 1 or num_experts % num_expert_group != 0:
        raise ValueError(
            f"num_expert_group must divide the number of experts E = {num_experts} (router_logits.size(1)), "
            f"got {num_expert_group}"
        )
    if not 1 <= topk_group <= num_expert_group:
        raise ValueError(f"topk_group must be 1 to num_expert_group = {num_expert_group}, got {topk_group}")
    group_size = num_experts // num_expert_group
    if topk > topk_group * group_size:
        raise ValueError(
            f"topk = {topk} experts don't fit into topk_group = {topk_group} groups of {group_size} experts; "
            "raise topk_group or lower num_expert_group"
        )
    return group_size


def _check_bias(correction_bias: Tensor, router_logits: Tensor) -> None:
    require_tensors(correction_bias=correction_bias)
    num_experts = router_logits.size(1)
    if correction_bias.dim() != 1 or correction_bias.size(0) != num_experts:
        raise ValueError(f"correction_bias must be (E,) = ({num_experts},), got {shape(correction_bias)}")
    if not correction_bias.is_floating_point():
        raise TypeError(f"correction_bias must be floating point, got {correction_bias.dtype}")
    if correction_bias.device != router_logits.device:
        raise ValueError(
            f"correction_bias must be on router_logits' device {router_logits.device}, "
            f"got {correction_bias.device}"
        )
