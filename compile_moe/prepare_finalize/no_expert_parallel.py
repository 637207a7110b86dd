"""Prepare and finalize on one device: nothing to dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.modular_parts import FusedMoEPrepareAndFinalize, PrepareResult
from compile_moe.ops.fused_moe import is_autocast, weight_input, write_reduced
from compile_moe.ops.problem_size import require, shape
from compile_moe.ops.quantize_tokens import quantize_tokens
from compile_moe.ops.weight_and_reduce import weight_and_reduce
from compile_moe.quant_config import (
    FusedMoEQuantConfig,
    check_static_scale,
    given_once,
    refuse_scales,
    require_quant_config,
)


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
        if self.quant_config is None:
            refuse_scales(type(self).__name__, a1_scale=a1_scale, a2_scale=a2_scale)
        require(a1.dim() == 2, lambda: f"a1 must be (M, K), got {shape(a1)}")
        if apply_router_weight_on_input:
            topk = topk_ids.size(1)
            require(topk == 1, lambda: f"apply_router_weight_on_input needs topk = 1, got topk = {topk}")
            a1 = weight_input(a1, topk_weights)
        if self.quant_config is None:
            return PrepareResult(a1)
        return self._quantized(self.quant_config, a1, a1_scale, a2_scale)

    def _quantized(
        self,
        config: FusedMoEQuantConfig,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
    ) -> PrepareResult:
        facts = config.facts
        a1_scale = given_once("a1_scale", a1_scale, config.a1_scale)
        a2_scale = given_once("a2_scale", a2_scale, config.a2_scale)
        check_static_scale(facts, "a1_scale", a1_scale)
        check_static_scale(facts, "a2_scale", a2_scale)
        if (a1_scale is None) != (a2_scale is None):
            given = "a1_scale" if a2_scale is None else "a2_scale"
            raise ValueError(
                f"a1_scale and a2_scale must be given both (static) or neither (dynamic), got {given} only: both GEMMs "
                "are quantized alike"
            )
        device_type = a1.device.type
        if is_autocast(device_type) and a1.dtype is not torch.float64:
            a1 = a1.to(torch.get_autocast_dtype(device_type))
        if not facts.scaling:
            return PrepareResult(a1)
        # One scale for all: a token is quantized before it is known where it goes.
        if a1_scale is not None and a1_scale.numel() > 1:
            a1_scale = a1_scale.amax()
        static = None if a1_scale is None else a1_scale.reshape(1)
        quantized, scales = quantize_tokens(a1, facts.scaling, static)
        # A given scale is not copied, as the op has to.
        return PrepareResult(quantized, scales if static is None else static)

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
