"""What experts without quantization share: biases, checks, workspaces, the published ``apply``."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike
from compile_moe.modular_kernel import FusedMoEPermuteExpertsUnpermute
from compile_moe.ops.fused_moe import check_biases, check_experts
from compile_moe.ops.problem_size import require, require_optional_tensors, shape
from compile_moe.unsupported import refuse_quant_config, refuse_scales


class UnquantizedExperts(FusedMoEPermuteExpertsUnpermute):
    """Base of the built-in experts.

    Args:
        w1_bias: (E, N), added before the activation, or None.
        w2_bias: (E, K), added to each expert's output before it is weighted, or None.
        quant_config: None; quantized layers are not supported by this version.
    """

    def __init__(
        self, w1_bias: Tensor | None = None, w2_bias: Tensor | None = None, quant_config: None = None
    ) -> None:
        refuse_quant_config(quant_config)
        require_optional_tensors(w1_bias=w1_bias, w2_bias=w2_bias)
        self.w1_bias = w1_bias
        self.w2_bias = w2_bias

    @abstractmethod
    def compute(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        activation: ActivationLike,
        expert_map: Tensor | None,
        zero_skipped: bool,
    ) -> Tensor:
        """Expert outputs (M, topk, K); slots that nobody computes are zeros if ``zero_skipped``."""

    def workspace_shapes(
        self, a: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        """The published sizes: both GEMMs' results share workspace13. These experts use neither workspace."""
        return M * topk * max(N, K), M * topk * N, a.dtype

    def apply(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        activation: ActivationLike,
        global_num_experts: int,
        expert_map: Tensor | None,
        w1_scale: Tensor | None,
        w2_scale: Tensor | None,
        w1_zp: Tensor | None,
        w2_zp: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_num_tokens: Tensor | None,
    ) -> Tensor:
        """Expert outputs (M, topk, K) in freshly allocated memory; zeros in slots that nobody computes."""
        self._check(
            hidden_states,
            w1,
            w2,
            topk_ids,
            global_num_experts,
            expert_map,
            expert_num_tokens,
            w1_scale=w1_scale,
            w2_scale=w2_scale,
            w1_zp=w1_zp,
            w2_zp=w2_zp,
            a1q_scale=a1q_scale,
            a2_scale=a2_scale,
        )
        return self.compute(hidden_states, w1, w2, topk_ids, activation, expert_map, True)

    def apply_unfilled(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        activation: ActivationLike,
        global_num_experts: int,
        expert_map: Tensor | None,
        w1_scale: Tensor | None,
        w2_scale: Tensor | None,
        w1_zp: Tensor | None,
        w2_zp: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_num_tokens: Tensor | None,
    ) -> Tensor:
        """``apply``, leaving slots that nobody computes unwritten."""
        self._check(
            hidden_states,
            w1,
            w2,
            topk_ids,
            global_num_experts,
            expert_map,
            expert_num_tokens,
            w1_scale=w1_scale,
            w2_scale=w2_scale,
            w1_zp=w1_zp,
            w2_zp=w2_zp,
            a1q_scale=a1q_scale,
            a2_scale=a2_scale,
        )
        return self.compute(hidden_states, w1, w2, topk_ids, activation, expert_map, False)

    apply_unfilled_counterpart = apply

    def _check(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        global_num_experts: int,
        expert_map: Tensor | None,
        expert_num_tokens: Tensor | None,
        **scales: Tensor | None,
    ) -> None:
        name = type(self).__name__
        refuse_scales(name, "an experts class", **scales)
        require(
            hidden_states.dim() == 2 and expert_num_tokens is None,
            lambda: (
                f"{name} takes tokens (M, K) without expert_num_tokens, got {shape(hidden_states)}; the batched "
                "format (E, max_num_tokens, K) needs an experts class for it"
            ),
        )
        check_experts(hidden_states, w1, w2, topk_ids, global_num_experts, expert_map)
        check_biases(w1, w2, self.w1_bias, self.w2_bias)
