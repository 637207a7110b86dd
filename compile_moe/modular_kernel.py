"""The modular MoE kernel: prepare, experts and finalize as exchangeable parts.

Names, signatures and contracts are those of the published modular-kernel interface; what differs is listed in each
docstring.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike
from compile_moe.dtensor_weights import local_experts, local_tensors
from compile_moe.modular_parts import (
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    PrepareResult,
    is_method,
)
from compile_moe.ops import _moe_problem_size
from compile_moe.ops.fused_moe import check_call
from compile_moe.ops.problem_size import require, require_optional_tensors, require_tensors, shape

__all__ = [
    "FusedMoEModularKernel",
    "FusedMoEPermuteExpertsUnpermute",
    "FusedMoEPrepareAndFinalize",
    "PrepareResult",
    "_moe_problem_size",
]


class FusedMoEModularKernel(torch.nn.Module):
    """One MoE layer from a prepare/finalize part and an experts part.

    Differs from the published class: the built-in parts allocate no workspaces, and where both parts are built in,
    skipped slots are masked in the reduction instead of being filled with zeros. Parts may hold state of their layer:
    use one kernel a layer.
    """

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalize,
        fused_experts: FusedMoEPermuteExpertsUnpermute,
    ) -> None:
        super().__init__()
        if not isinstance(prepare_finalize, FusedMoEPrepareAndFinalize):
            raise TypeError(
                f"prepare_finalize must be a FusedMoEPrepareAndFinalize, got {type(prepare_finalize).__name__}"
            )
        if not isinstance(fused_experts, FusedMoEPermuteExpertsUnpermute):
            raise TypeError(
                f"fused_experts must be a FusedMoEPermuteExpertsUnpermute, got {type(fused_experts).__name__}"
            )
        for name, bias in getattr(fused_experts, "sharded_biases", {}).items():
            local_experts(name, bias, prepare_finalize)
        self.prepare_finalize = prepare_finalize
        self.fused_experts = fused_experts

    def forward(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        inplace: bool = False,
        activation: ActivationLike = "silu",
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,
        w1_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        w1_zp: Tensor | None = None,
        w2_zp: Tensor | None = None,
        a1_scale: Tensor | None = None,
        a2_scale: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: (M, K).
            w1: (E, N, K), N = 2I where the activation is gated, else I. w2: (E, K, I). They, their scales and their
                zero points may be DTensors: replicated, or sharded by expert as an expert-parallel prepare_finalize
                has its experts on its group's ranks.
            topk_weights: (M, topk), floating point. topk_ids: (M, topk), int32 or int64; negative ids, ids that
                expert_map sends to -1, and the id global_num_experts skip their slot.
            inplace: write the result into hidden_states and return it.
            activation: name, :class:`compile_moe.Activation`, or callable gate_up (..., N) -> (..., I).
            global_num_experts: size of the id space; -1 for w1's number of experts, or expert_map's length.
            expert_map: (global_num_experts,), global to local ids, -1 where not local.
            w1_scale, w2_scale, w1_zp, w2_zp, a1_scale, a2_scale: for experts classes that handle them.
            apply_router_weight_on_input: weight the input instead of the outputs; topk must be 1.

        Returns:
            (M, K) in hidden_states' dtype. Under autocast in the autocast dtype, as torch's GEMMs, where a built-in
            class finalizes out of place.

        Raises:
            ValueError, TypeError: arguments that don't fit together.
        """
        require_tensors(
            hidden_states=hidden_states, w1=w1, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids
        )
        require_optional_tensors(expert_map=expert_map)
        w1, w2, w1_scale, w2_scale, w1_zp, w2_zp = local_tensors(
            self.prepare_finalize,
            ("w1", w1),
            ("w2", w2),
            ("w1_scale", w1_scale),
            ("w2_scale", w2_scale),
            ("w1_zp", w1_zp),
            ("w2_zp", w2_zp),
        )
        # No more than what holds for every format of weights: the experts check theirs.
        check_call(hidden_states, w1, w2, topk_weights, topk_ids, expert_map, apply_router_weight_on_input)
        E, M, N, K, topk = _moe_problem_size(hidden_states, w1, w2, topk_ids)
        if global_num_experts == -1:
            global_num_experts = E if expert_map is None else expert_map.size(0)
        experts, parts = self.fused_experts, self.prepare_finalize
        # Overridden on a subclass, a mixin or an instance: then the shortcut doesn't speak for it.
        has_unfilled = is_method(experts.apply, type(experts).apply_unfilled_counterpart)
        has_reduce = is_method(parts.finalize, type(parts).reduce_counterpart)

        # As published, buffers exist before prepare, and hold zeros.
        output = None
        if not has_reduce:
            output = hidden_states if inplace else torch.zeros_like(hidden_states)
        size13, size2, workspace_dtype = 0, 0, hidden_states.dtype
        if not has_unfilled:
            size13, size2, workspace_dtype = experts.workspace_shapes(
                hidden_states, M, N, K, topk, global_num_experts
            )
        workspace13 = hidden_states.new_zeros(size13, dtype=workspace_dtype)
        workspace2 = hidden_states.new_zeros(size2, dtype=workspace_dtype)

        a1q, a1q_scale, expert_num_tokens, ids, weights = _prepare_result(
            parts.prepare(
                hidden_states,
                a1_scale,
                a2_scale,
                topk_weights,
                topk_ids,
                global_num_experts,
                expert_map,
                apply_router_weight_on_input,
            ),
            topk_ids,
            topk_weights,
        )
        is_batched = a1q.dim() == 3
        unfilled = has_unfilled and has_reduce
        # A user's experts may make tokens of a batch; ours return what they get.
        require(
            not has_reduce or is_batched is parts.reduces_batches or (is_batched and not unfilled),
            lambda: (
                f"{type(parts).__name__} prepared {shape(a1q)}, but its finalize is for "
                f"{'batches (E, max_num_tokens, K)' if parts.reduces_batches else 'tokens (M, K)'}; override "
                "finalize, too"
            ),
        )
        apply = experts.apply_unfilled if unfilled else experts.apply
        fused_out = apply(  # type: ignore[misc]
            a1q,
            w1,
            w2,
            ids,
            activation=activation,
            global_num_experts=global_num_experts,
            expert_map=expert_map,
            w1_scale=w1_scale,
            w2_scale=w2_scale,
            w1_zp=w1_zp,
            w2_zp=w2_zp,
            a1q_scale=a1q_scale,
            a2_scale=a2_scale,
            workspace13=workspace13,
            workspace2=workspace2,
            expert_num_tokens=expert_num_tokens,
        )
        if output is not None:
            parts.finalize(output, fused_out, topk_weights, topk_ids, apply_router_weight_on_input)
            return output
        mask = (ids, expert_map, E) if unfilled else (None, None, -1)
        if not unfilled:
            sizes = "E, max_num_tokens, K" if parts.reduces_batches else "M, topk, K"
            expected = (*(a1q.shape[:2] if parts.reduces_batches else (ids.size(0), topk)), K)
            require(
                tuple(fused_out.shape) == expected,
                lambda: f"apply must return ({sizes}) = {expected}, got {shape(fused_out)}",
            )
            fused_out = fused_out.to(hidden_states.dtype)
        result = parts.reduce(  # type: ignore[misc]
            fused_out, weights, *mask, apply_router_weight_on_input
        )
        require(
            tuple(result.shape) == (M, K),
            lambda: (
                f"reduce must return (M, K) = {(M, K)}, got {shape(result)}; where prepare dispatches other rows, "
                "finalize must bring them back: override it"
            ),
        )
        return hidden_states.copy_(result) if inplace else result


def _prepare_result(
    returned: Any, topk_ids: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """What ``prepare`` returned, with the layer's ids and weights where it gave none."""
    if not isinstance(returned, tuple) or len(returned) not in (3, 5) or not isinstance(returned[0], Tensor):
        given = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        raise TypeError(
            "prepare must return (hidden_states, scale, expert_num_tokens) or a compile_moe.PrepareResult, "
            f"got {given}"
        )
    result = PrepareResult(*returned)
    return (
        *result[:3],
        topk_ids if result.topk_ids is None else result.topk_ids,
        topk_weights if result.topk_weights is None else result.topk_weights,
    )
