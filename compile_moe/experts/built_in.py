"""What the built-in experts share: biases, quantization, checks, workspaces, the published ``apply``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike
from compile_moe.dtensor_weights import is_dtensor, shard_of_experts
from compile_moe.experts.ordered_rows import OrderedRows
from compile_moe.experts.quantized import QuantizedLayer
from compile_moe.modular_parts import FusedMoEPermuteExpertsUnpermute
from compile_moe.ops.layer_checks import check_biases, check_experts, check_id_space, is_autocast
from compile_moe.ops.problem_size import require, require_optional_tensors, shape
from compile_moe.quant_config import (
    FusedMoEQuantConfig,
    SchemeFacts,
    check_static_scale,
    check_zero_points,
    given_once,
    refuse_scales,
    require_quant_config,
)


class BuiltInExperts(FusedMoEPermuteExpertsUnpermute):
    """Base of the built-in experts.

    For arguments see :class:`TritonExperts`.
    """

    def __init__(
        self,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        quant_config: FusedMoEQuantConfig | None = None,
    ) -> None:
        require_quant_config(quant_config)
        self.quant_config = quant_config
        require_optional_tensors(w1_bias=w1_bias, w2_bias=w2_bias)
        given = {"w1_bias": w1_bias, "w2_bias": w2_bias}
        #: For the kernel, whose other part says whether they fit.
        self.sharded_biases = {name: bias for name, bias in given.items() if is_dtensor(bias)}
        self.w1_bias = shard_of_experts("w1_bias", w1_bias)
        self.w2_bias = shard_of_experts("w2_bias", w2_bias)

    @abstractmethod
    def sort_tokens(
        self, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sorted slots and expert offsets, as the op ``sort_tokens``."""

    @abstractmethod
    def sort_batch(self, expert_num_tokens: Tensor, max_num_tokens: int) -> tuple[Tensor, Tensor]:
        """Sorted slots and expert offsets, as the op ``sort_batch``."""

    @abstractmethod
    def compute(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        order: OrderedRows,
        activation: ActivationLike,
        zero_skipped: bool,
    ) -> Tensor:
        """Expert outputs (num_tokens, topk, K) of hidden_states (num_tokens, K); slots that nobody computes are zeros
        if ``zero_skipped``.
        """

    @abstractmethod
    def compute_quantized(
        self, layer: QuantizedLayer, order: OrderedRows, activation: ActivationLike, zero_skipped: bool
    ) -> Tensor:
        """``compute`` for a quantized layer."""

    def check_format(
        self,
        hidden_states: Tensor,
        a1q_scale: Tensor | None,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        expert_num_tokens: Tensor | None,
    ) -> None:
        """Check that ``prepare`` returned the format of tokens that this class takes."""
        require(
            hidden_states.dim() == 2 and expert_num_tokens is None,
            lambda: (
                f"{type(self).__name__} takes tokens (M, K) without expert_num_tokens, got {shape(hidden_states)}"
                f"{'' if expert_num_tokens is None else ' with them'}; the batched format (E, max_num_tokens, K) is "
                "for BatchedTritonExperts and BatchedTorchExperts"
            ),
        )

    def order_of(
        self,
        w1: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        expert_num_tokens: Tensor | None,
    ) -> OrderedRows:
        """The order of the rows that ``compute`` gets."""
        m, topk = topk_ids.shape
        return OrderedRows(*self.sort_tokens(topk_ids, w1.size(0), expert_map), m, topk)

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
        return self._run(
            True,
            hidden_states,
            w1,
            w2,
            topk_ids,
            activation,
            global_num_experts,
            expert_map,
            w1_scale,
            w2_scale,
            w1_zp,
            w2_zp,
            a1q_scale,
            a2_scale,
            workspace13,
            workspace2,
            expert_num_tokens,
        )

    def apply_unfilled(self, *arguments: Any, **options: Any) -> Tensor:
        """``apply``, leaving slots that nobody computes unwritten."""
        return self._run(False, *arguments, **options)

    apply_unfilled_counterpart = apply

    def _run(
        self,
        zero_skipped: bool,
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
        scales = {
            "w1_scale": w1_scale,
            "w2_scale": w2_scale,
            "w1_zp": w1_zp,
            "w2_zp": w2_zp,
            "a1q_scale": a1q_scale,
            "a2_scale": a2_scale,
        }
        name = type(self).__name__
        if self.quant_config is None:
            refuse_scales(name, **scales)
        self.check_format(hidden_states, a1q_scale, w1, w2, topk_ids, expert_num_tokens)
        if self.quant_config is None:
            check_experts(hidden_states, w1, w2, topk_ids, global_num_experts, expert_map)
            check_biases(w1, w2, self.w1_bias, self.w2_bias)
        else:
            check_id_space(w1, topk_ids, global_num_experts, expert_map)
        batch_sizes = None
        if hidden_states.dim() == 3:
            # Rows like any others, each a slot; those without a token are nobody's to fill.
            batch_sizes, zero_skipped = hidden_states.shape[:2], False
            if a1q_scale is not None and a1q_scale.dim() == 3:
                scales["a1q_scale"] = a1q_scale.flatten(0, 1)
            hidden_states = hidden_states.flatten(0, 1)
        order = self.order_of(w1, topk_ids, expert_map, expert_num_tokens)
        if self.quant_config is None:
            out = self.compute(hidden_states, w1, w2, order, activation, zero_skipped)
        else:
            layer = self._quantized_layer(
                self.quant_config, hidden_states, w1, w2, workspace13.dtype, **scales
            )
            out = self.compute_quantized(layer, order, activation, zero_skipped)
        return out if batch_sizes is None else out.view(*batch_sizes, out.size(-1))

    def _quantized_layer(
        self,
        config: FusedMoEQuantConfig,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        dtype: torch.dtype,
        *,
        w1_scale: Tensor | None,
        w2_scale: Tensor | None,
        w1_zp: Tensor | None,
        w2_zp: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
    ) -> QuantizedLayer:
        facts = config.facts
        w1_zp = given_once("w1_zp", w1_zp, config.w1_zp)
        w2_zp = given_once("w2_zp", w2_zp, config.w2_zp)
        check_zero_points(facts, w1_zp, w2_zp)
        a2_scale = given_once("a2_scale", a2_scale, config.a2_scale)
        check_static_scale(facts, "a2_scale", a2_scale, w1.size(0))
        w1_bias, w2_bias, device_type = self.w1_bias, self.w2_bias, hidden_states.device.type
        if is_autocast(device_type) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
            w1_bias, w2_bias = (b if b is None else b.to(dtype) for b in (w1_bias, w2_bias))
            if not facts.scaling:
                hidden_states = hidden_states.to(dtype)
        return QuantizedLayer(
            facts,
            dtype,
            hidden_states,
            a1q_scale,
            w1,
            _weight_scale(facts, "w1", w1_scale, config.w1_scale),
            w1_zp,
            w1_bias,
            w2,
            _weight_scale(facts, "w2", w2_scale, config.w2_scale),
            w2_zp,
            w2_bias,
            a2_scale,
        )


def _weight_scale(facts: SchemeFacts, name: str, given: Tensor | None, configured: Tensor | None) -> Tensor:
    scale = given_once(f"{name}_scale", given, configured)
    if scale is None:
        raise ValueError(
            f"{name}_scale is missing: scheme {facts.text} needs {facts.scale_layout} of {name}; pass it in the "
            "quant_config, or to the call"
        )
    return scale
