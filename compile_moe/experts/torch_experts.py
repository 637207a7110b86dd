"""Experts in plain PyTorch: the oracle, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike, call_activation, resolve_activation
from compile_moe.experts.built_in import BuiltInExperts
from compile_moe.experts.ordered_rows import OrderedRows
from compile_moe.experts.quantized import QuantizedLayer, Stages, run_quantized, without_skipped
from compile_moe.graph_constants import constant_in_graphs
from compile_moe.ops.epilogue import ProgramTuples, evaluate_steps, parse
from compile_moe.ops.grouped_linear import grouped_linear
from compile_moe.ops.layer_checks import check_intermediate
from compile_moe.ops.quantized_grouped_linear import quantized_grouped_linear
from compile_moe.ops.sort_batch import sort_batch_torch
from compile_moe.ops.sort_tokens import sort_tokens, sort_tokens_torch


@constant_in_graphs
def _program(epilogue: str) -> ProgramTuples:
    return parse(epilogue).as_tuples()


def _quantized_gather(
    hidden_states: Tensor,
    scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    slots: Tensor,
    offsets: Tensor,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None,
    epilogue: str,
    zero_skipped: bool,
) -> Tensor:
    """``quantized_gather_gemm`` from gathered rows."""
    rows = slots.long() // topk
    if scale is not None and scale.dim() == 2:
        scale = scale[rows]
    out = quantized_grouped_linear(
        hidden_states[rows], scale, w1, w1_scale, w1_zp, offsets, scheme, out_dtype, bias
    )
    if epilogue:
        out = evaluate_steps(*_program(epilogue), out)
        if zero_skipped:
            out = without_skipped(out, offsets)
    return out


def _quantized_scatter(
    intermediate: Tensor,
    scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    slots: Tensor,
    offsets: Tensor,
    num_tokens: int,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
    bias: Tensor | None,
    zero_skipped: bool,
) -> Tensor:
    """``quantized_scatter_gemm``; skipped slots are always zeros."""
    rows = quantized_grouped_linear(
        intermediate, scale, w2, w2_scale, w2_zp, offsets, scheme, out_dtype, bias
    )
    out = torch.zeros_like(rows).index_copy(0, slots.long(), rows)
    return out.view(num_tokens, topk, w2.size(1))


class TorchExperts(BuiltInExperts):
    """Gather, one GEMM an expert, activation, one GEMM an expert, scatter, each in plain PyTorch.

    The per-expert loop reads the token counts on the host: on CUDA it synchronizes and can't be captured.

    Args:
        w1_bias, w2_bias, quant_config: as for :class:`TritonExperts`.
    """

    def sort_tokens(
        self, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # On CPU the op is the same PyTorch, with a check of the ids' values.
        sort = sort_tokens if topk_ids.device.type == "cpu" else sort_tokens_torch
        result: tuple[Tensor, Tensor] = sort(topk_ids, num_experts, expert_map)
        return result

    def sort_batch(self, expert_num_tokens: Tensor, max_num_tokens: int) -> tuple[Tensor, Tensor]:
        return sort_batch_torch(expert_num_tokens, max_num_tokens)

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
        rows = slots.long()
        gate_up = grouped_linear(hidden_states[rows // topk], w1, offsets, self.w1_bias)
        if self.overrides_activation:
            intermediate = gate_up.new_zeros((gate_up.size(0), w2.size(2)))
            self.activation(activation, intermediate, gate_up)
        else:
            epilogue, function, _ = resolve_activation(activation, w1.size(1), hidden_states)
            if function is None:
                check_intermediate(w1, w2, activation, not epilogue.startswith("ungated"))
                intermediate = evaluate_steps(*_program(epilogue), gate_up)
            else:
                intermediate = call_activation(function, gate_up, w2.size(2))
        expert_rows = grouped_linear(intermediate, w2, offsets, self.w2_bias)
        # Rows of skipped slots are zeros already.
        out = torch.zeros_like(expert_rows).index_copy(0, rows, expert_rows)
        return out.view(m, topk, w2.size(1))

    def compute_quantized(
        self, layer: QuantizedLayer, order: OrderedRows, activation: ActivationLike, zero_skipped: bool
    ) -> Tensor:
        stages = Stages(_quantized_gather, _quantized_scatter)
        return run_quantized(self, stages, layer, order, activation, zero_skipped)
