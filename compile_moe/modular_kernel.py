"""The modular MoE kernel: prepare, experts and finalize as exchangeable parts.

Names, signatures and contracts are those of the published modular-kernel interface; what differs is listed in each
docstring.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike
from compile_moe.dtensor_weights import local_experts
from compile_moe.modular_call import Arguments, ModularCall
from compile_moe.modular_parts import (
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    PrepareResult,
)
from compile_moe.ops import _moe_problem_size

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
        return self.start(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            inplace,
            activation,
            global_num_experts,
            expert_map,
            w1_scale,
            w2_scale,
            w1_zp,
            w2_zp,
            a1_scale,
            a2_scale,
            apply_router_weight_on_input,
        ).result()

    def start(self, *arguments: Any, **options: Any) -> ModularCall:
        """Begin a call with ``forward``'s arguments, as far as sending the tokens to their experts.

        Other work can run while they travel there and back, such as a shared expert:

        >>> call = layer.start(hidden_states, w1, w2, topk_weights, topk_ids)           # doctest: +SKIP
        >>> gate_up = shared.gate_up_proj(hidden_states)    # while tokens travel        # doctest: +SKIP
        >>> call.compute()                                                              # doctest: +SKIP
        >>> shared_out = shared.down_proj(act(gate_up))     # while results travel       # doctest: +SKIP
        >>> out = call.result() + shared_out                                            # doctest: +SKIP

        or the next microbatch's call, through a layer with prepare/finalize parts of its own. On one device nothing
        travels. In compiled code inductor decides on the order. Hooks on this module do not run.
        """
        return ModularCall(self.prepare_finalize, self.fused_experts, Arguments(*arguments, **options))
