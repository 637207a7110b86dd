"""Experts on the library's ops: Triton kernels on CUDA, their PyTorch implementations elsewhere."""

from __future__ import annotations

from torch import Tensor

from compile_moe.activations import ActivationLike, call_activation, resolve_activation
from compile_moe.experts.built_in import BuiltInExperts
from compile_moe.experts.ordered_rows import OrderedRows
from compile_moe.experts.quantized import QuantizedLayer, Stages, run_quantized
from compile_moe.ops.fused_moe import run_gemms
from compile_moe.ops.gather_gemm import gather_gemm
from compile_moe.ops.layer_checks import check_intermediate
from compile_moe.ops.quantized_gather_gemm import quantized_gather_gemm
from compile_moe.ops.quantized_scatter_gemm import quantized_scatter_gemm
from compile_moe.ops.registry import implementation
from compile_moe.ops.scatter_gemm import scatter_gemm
from compile_moe.ops.sort_batch import sort_batch
from compile_moe.ops.sort_tokens import sort_tokens


class TritonExperts(BuiltInExperts):
    """Token sort, GEMM 1 with the activation in its epilogue, GEMM 2.

    An activation that is no function of one gate and one up element, and an overridden ``activation`` method, run
    between the GEMMs instead of in the epilogue.

    Args:
        w1_bias: (E, N), added before the activation, or None.
        w2_bias: (E, K), added to each expert's output before it is weighted, or None. Both may be DTensors, as w1
            and w2 of :class:`compile_moe.FusedMoEModularKernel` may.
        quant_config: a :class:`compile_moe.FusedMoEQuantConfig`: how the weights and the tokens from ``prepare`` are
            quantized, or None. Results then have workspace13's dtype (under autocast, the autocast dtype): quantized
            tokens don't say what they were.
    """

    def sort_tokens(
        self, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = implementation(sort_tokens, topk_ids, expert_map)(
            topk_ids, num_experts, expert_map
        )
        return result

    def sort_batch(self, expert_num_tokens: Tensor, max_num_tokens: int) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = implementation(sort_batch, expert_num_tokens)(
            expert_num_tokens, max_num_tokens
        )
        return result

    def compute(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        order: OrderedRows,
        activation: ActivationLike,
        zero_skipped: bool,
    ) -> Tensor:
        slots, offsets, m, topk, _ = order
        function = None
        if not self.overrides_activation:
            epilogue, function, _ = resolve_activation(activation, w1.size(1), hidden_states)
            if function is None:
                check_intermediate(w1, w2, activation, not epilogue.startswith("ungated"))
                return run_gemms(
                    hidden_states,
                    w1,
                    w2,
                    slots,
                    offsets,
                    topk,
                    epilogue,
                    self.w1_bias,
                    self.w2_bias,
                    zero_skipped,
                )
        # The caller's code may read every row, also those of skipped slots.
        gate_up = gather_gemm(hidden_states, w1, slots, offsets, topk, self.w1_bias, "", True)
        if function is None:
            intermediate = gate_up.new_zeros((gate_up.size(0), w2.size(2)))
            self.activation(activation, intermediate, gate_up)
        else:
            intermediate = call_activation(function, gate_up, w2.size(2))
        return scatter_gemm(intermediate, w2, slots, offsets, m, topk, self.w2_bias, zero_skipped)

    def compute_quantized(
        self, layer: QuantizedLayer, order: OrderedRows, activation: ActivationLike, zero_skipped: bool
    ) -> Tensor:
        stages = Stages(quantized_gather_gemm, quantized_scatter_gemm)
        return run_quantized(self, stages, layer, order, activation, zero_skipped)
