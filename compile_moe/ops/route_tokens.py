"""Router: from a score for each expert to the experts of each token and their weights.

Args:
    router_logits: (M, E), bfloat16, float16, float32 or float64, any strides.
    topk: experts per token, 1 to E.
    scoring: one of
        "softmax": softmax over all experts, then the topk largest (Mixtral, Qwen3-MoE, OLMoE);
        "topk_softmax": the topk largest, then softmax over them (gpt-oss);
        "sigmoid": the topk largest sigmoids (DeepSeek-V3).
    correction_bias: (E,), floating point; for "softmax" and "sigmoid". Experts are chosen by scores + bias and weighted
        by scores.
    num_expert_group, topk_group: experts form num_expert_group groups of consecutive ids, of which a token chooses
        among topk_group, those with the largest sums of their two best experts; for "sigmoid" only.
    renormalize: divide the chosen weights by their sum + epsilon.
    routed_scaling_factor: factor on the weights, after renormalization.
    epsilon: keeps weights zero, instead of NaN, where all chosen scores are 0 in float32.
    excluded_score: what experts outside the topk_group groups have instead of score + bias; None: they are not chosen.

Returns:
    topk_weights (M, topk) float32.
    topk_ids (M, topk) int64, best first, distinct within a row.

Computed in float32. NaN scores are the largest, as for torch.topk. On CUDA the lowest id wins a tie, and equal
inputs give equal bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compile_moe.ops.kernels import route_tokens as kernels
from compile_moe.ops.problem_size import CPU_DTYPES, require_tensors, shape
from compile_moe.ops.registry import OutputSpec, define_op

SCORINGS = ("softmax", "topk_softmax", "sigmoid")
#: What one program of the kernel holds.
MAX_EXPERTS = 4096
EPSILON = 1e-20
ARGUMENTS = (
    "Tensor router_logits, SymInt topk, str scoring, Tensor? correction_bias=None, SymInt num_expert_group=1, "
    "SymInt topk_group=1, bool renormalize=False, float routed_scaling_factor=1.0, "
    f"float epsilon={EPSILON}, float? excluded_score=None"
)


# Plain raises: dynamo traces them with any message, torch._check only with constants in the message.


def check_routing(
    router_logits: Tensor,
    topk: int,
    scoring: str,
    correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    epsilon: float = EPSILON,
    excluded_score: float | None = None,
) -> None:
    """Raise ValueError or TypeError for arguments that don't fit together."""
    require_tensors(router_logits=router_logits)
    if router_logits.dim() != 2:
        raise ValueError(f"router_logits must be (M, E), got {shape(router_logits)}")
    _check_dtype("router_logits", router_logits)
    num_experts = router_logits.size(1)
    if not 1 <= topk <= num_experts:
        raise ValueError(f"topk must be 1 to E = {num_experts} (router_logits.size(1)), got {topk}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if scoring != "sigmoid" and (num_expert_group != 1 or topk_group != 1):
        raise ValueError(
            f"num_expert_group and topk_group need scoring='sigmoid', got {scoring!r}; leave them out"
        )
    if scoring == "topk_softmax" and correction_bias is not None:
        raise ValueError(
            f"correction_bias needs scoring='softmax' or 'sigmoid', got {scoring!r}; leave it out"
        )
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    if excluded_score is not None and math.isnan(excluded_score):
        raise ValueError("excluded_score must be a number or None, got NaN")
    _check_groups(num_experts, topk, num_expert_group, topk_group)
    if correction_bias is not None:
        _check_bias(correction_bias, router_logits)


def _check_dtype(name: str, t: Tensor) -> None:
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")
    if t.dtype not in CPU_DTYPES:
        raise TypeError(
            f"{name} must be one of {', '.join(str(d) for d in CPU_DTYPES)}, got {t.dtype}; convert it"
        )


def _check_groups(num_experts: int, topk: int, num_expert_group: int, topk_group: int) -> None:
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


def _check_bias(correction_bias: Tensor, router_logits: Tensor) -> None:
    require_tensors(correction_bias=correction_bias)
    num_experts = router_logits.size(1)
    if correction_bias.dim() != 1 or correction_bias.size(0) != num_experts:
        raise ValueError(f"correction_bias must be (E,) = ({num_experts},), got {shape(correction_bias)}")
    _check_dtype("correction_bias", correction_bias)
    if correction_bias.device != router_logits.device:
        raise ValueError(
            f"correction_bias must be on router_logits' device {router_logits.device}, "
            f"got {correction_bias.device}"
        )


def check_expert_count(router_logits: Tensor) -> None:
    if router_logits.size(1) > MAX_EXPERTS:
        raise ValueError(
            f"router_logits must have at most {MAX_EXPERTS} experts, got {shape(router_logits)}; the functions of "
            "compile_moe.routers take more"
        )


def _check(router_logits: Tensor, *arguments: Any, **options: Any) -> None:
    check_routing(router_logits, *arguments, **options)
    check_expert_count(router_logits)


def _outputs(router_logits: Tensor, topk: int, *rest: Any, **options: Any) -> tuple[OutputSpec, ...]:
    m = router_logits.size(0)
    return ((m, topk), torch.float32), ((m, topk), torch.int64)


def route_tokens_torch(
    router_logits: Tensor,
    topk: int,
    scoring: str,
    correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    epsilon: float = EPSILON,
    excluded_score: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The result in plain PyTorch: any device, traceable, differentiable."""
    if scoring == "topk_softmax":
        logits, ids = router_logits.float().topk(topk)
        weights = logits.softmax(-1)
    else:
        logits = router_logits.float()
        scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
        choice = scores if correction_bias is None else scores + correction_bias.float()
        ids = _limit_to_groups(choice, num_expert_group, topk_group, excluded_score).topk(topk).indices
        weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + epsilon)
    if routed_scaling_factor != 1.0:
        weights = weights * routed_scaling_factor
    return weights, ids


def _limit_to_groups(
    choice: Tensor, num_expert_group: int, topk_group: int, excluded_score: float | None
) -> Tensor:
    """``choice`` (M, E), but excluded_score or -inf outside the topk_group groups whose two best sum up highest."""
    if topk_group == num_expert_group:
        return choice
    groups = choice.unflatten(1, (num_expert_group, -1))
    group_scores = groups.topk(min(2, groups.size(2))).values.sum(-1)
    best = group_scores.topk(topk_group).indices
    chosen = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
    excluded = -math.inf if excluded_score is None else excluded_score
    return groups.masked_fill(~chosen.unsqueeze(-1), excluded).flatten(1)


def _launch(outputs: tuple[Tensor, Tensor], *arguments: Any) -> None:
    kernels.route_tokens(*outputs, *arguments)


route_tokens = define_op(
    "route_tokens",
    ARGUMENTS,
    ("topk_weights", "topk_ids"),
    check=_check,
    outputs=_outputs,
    torch_impl=route_tokens_torch,
    launch=_launch,
)
