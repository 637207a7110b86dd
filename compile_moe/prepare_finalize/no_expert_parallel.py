"""Prepare and finalize on one device: nothing to dispatch."""

from __future__ import annotations

from torch import Tensor

from compile_moe.modular_parts import FusedMoEPrepareAndFinalize, PrepareResult
from compile_moe.ops.fused_moe import write_reduced
from compile_moe.ops.problem_size import require, shape
from compile_moe.ops.weight_and_reduce import weight_and_reduce
from compile_moe.prepare_finalize.quantized_input import quantized_input
from compile_moe.quant_config import FusedMoEQuantConfig, require_quant_config


class MoEPrepareAndFinalizeNoEP(FusedMoEPrepareAndFinalize):
    """Prepare and finalize on one device.

    Args:
        quant_config: how the experts want their tokens quantized, or None.
    """

    def __init__(self, quant_config: FusedMoEQuantConfig | None = None) -> None:
        require_quant_config(quant_config)
        self.quant_config = quant_config

    def prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> PrepareResult:
        """The tokens, weighted if asked, then quantized if the config's scheme quantizes tokens.

        Under autocast they are cast to its dtype first, where there is a config.
        """
        tokens = quantized_input(
            type(self).__name__,
            self.quant_config,
            a1,
            a1_scale,
            a2_scale,
            topk_weights,
            topk_ids,
            apply_router_weight_on_input,
        )
        return PrepareResult(*tokens)

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Weight and sum (M, topk, K) into output (M, K), accumulating in float32."""
        expected = (fused_expert_output.size(0), fused_expert_output.size(-1))
        require(
            output.dim() == 2 and tuple(output.shape) == expected,
            lambda: f"output must be (M, K) = {expected}, got {shape(output)}",
        )
        write_reduced(
            output, fused_expert_output, topk_weights, None, None, -1, not apply_router_weight_on_input
        )

    def reduce(
        self,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor | None,
        expert_map: Tensor | None,
        num_experts: int,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        """``finalize`` as a function, ignoring skipped slots if topk_ids is given."""
        return weight_and_reduce(
            fused_expert_output,
            topk_weights,
            topk_ids,
            expert_map,
            num_experts,
            not apply_router_weight_on_input,
        )

    reduce_counterpart = finalize
