"""Experts in plain PyTorch: the oracle, for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike, call_activation, resolve_activation
from compile_moe.experts.unquantized import UnquantizedExperts
from compile_moe.graph_constants import constant_in_graphs
from compile_moe.ops.epilogue import ProgramTuples, evaluate_steps, parse
from compile_moe.ops.fused_moe import check_intermediate
from compile_moe.ops.grouped_linear import grouped_linear
from compile_moe.ops.sort_tokens import sort_tokens, sort_tokens_torch


@constant_in_graphs
def _program(epilogue: str) -> ProgramTuples:
    return parse(epilogue).as_tuples()


class TorchExperts(UnquantizedExperts):
    """Gather, one GEMM an expert, activation, one GEMM an expert, scatter, each in plain PyTorch.

    The per-expert loop reads the token counts on the host: on CUDA it synchronizes and can't be captured.
    """

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
        m, topk = topk_ids.shape
        # On CPU the op is the same PyTorch, with a check of the ids' values.
        sort = sort_tokens if topk_ids.device.type == "cpu" else sort_tokens_torch
        slots, offsets = sort(topk_ids, w1.size(0), expert_map)
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
