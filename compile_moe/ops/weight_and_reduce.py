"""Finalize: weight each expert's output with the router's weight and sum over a token's experts.

Args:
    fused_out: (M, topk, K) in slot order.
    topk_weights: (M, topk), floating point.
    topk_ids, expert_map, num_experts: as for ``sort_tokens``; slots that they skip contribute exactly nothing,
        whatever fused_out holds there. Without topk_ids (None) every slot counts.
    apply_weights: False sums without weighting (the weights were applied to the input).

Returns:
    (M, K) in fused_out's dtype, contiguous. Accumulated in float32 in slot order (float64 for float64), rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.kernels import weight_and_reduce as kernels
from compile_moe.ops.problem_size import (
    check_device,
    check_expert_map,
    check_float_dtype,
    check_ids,
    require,
    require_type,
    shape,
)
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.ops.sort_tokens import local_experts


def _check(
    fused_out: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
    num_experts: int = -1,
    apply_weights: bool = True,
) -> None:
    require(fused_out.dim() == 3, lambda: f"fused_out must be (M, topk, K), got {shape(fused_out)}")
    check_float_dtype("fused_out", fused_out)
    check_topk_weights(topk_weights, fused_out)
    require(
        topk_weights.dim() == 2
        and topk_weights.size(1) == fused_out.size(1)
        and topk_weights.size(0) == fused_out.size(0),
        lambda: f"topk_weights must be (M, topk) = {shape(fused_out)[:2]}, got {shape(topk_weights)}",
    )
    if topk_ids is None:
        require(expert_map is None, lambda: "expert_map without topk_ids masks nothing; pass topk_ids too")
        return
    check_ids(topk_ids)
    check_device("fused_out", fused_out, topk_ids=topk_ids)
    check_expert_map(expert_map, topk_ids)
    require(num_experts >= 1, lambda: f"num_experts must be given with topk_ids, got {num_experts}")
    require(
        topk_ids.size(1) == fused_out.size(1) and topk_ids.size(0) == fused_out.size(0),
        lambda: f"topk_ids must be (M, topk) = {shape(fused_out)[:2]}, got {shape(topk_ids)}",
    )


def check_topk_weights(topk_weights: Tensor, reference: Tensor) -> None:
    require_type(
        topk_weights.is_floating_point(),
        lambda: f"topk_weights must be floating point, got {topk_weights.dtype}",
    )
    check_device("hidden_states", reference, topk_weights=topk_weights)


def _outputs(
    fused_out: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
    num_experts: int = -1,
    apply_weights: bool = True,
) -> tuple[OutputSpec, ...]:
    return (((fused_out.size(0), fused_out.size(2)), fused_out.dtype),)


def weight_and_reduce_torch(
    fused_out: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
    num_experts: int = -1,
    apply_weights: bool = True,
) -> Tensor:
    """The result in plain PyTorch: any device, traceable."""
    compute_dtype = torch.float64 if fused_out.dtype is torch.float64 else torch.float32
    terms = fused_out.to(compute_dtype)
    if topk_ids is not None:
        valid = local_experts(topk_ids, num_experts, expert_map) < num_experts
        terms = torch.where(valid.unsqueeze(-1), terms, 0)
        topk_weights = torch.where(valid, topk_weights, 0)
    if apply_weights:
        terms = terms * topk_weights.to(compute_dtype).unsqueeze(-1)
    return terms.sum(1).to(fused_out.dtype)


def _launch(
    outputs: tuple[Tensor],
    fused_out: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
    num_experts: int = -1,
    apply_weights: bool = True,
) -> None:
    kernels.weight_and_reduce(
        outputs[0], fused_out, topk_weights, topk_ids, expert_map, num_experts, apply_weights
    )


weight_and_reduce = define_op(
    "weight_and_reduce",
    "Tensor fused_out, Tensor topk_weights, Tensor? topk_ids=None, Tensor? expert_map=None, "
    "SymInt num_experts=-1, bool apply_weights=True",
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=weight_and_reduce_torch,
    launch=_launch,
)
