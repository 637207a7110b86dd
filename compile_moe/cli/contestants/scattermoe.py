"""ScatterMoE's Triton kernels: ``parallel_linear`` twice, as in its GLUMLP, written against scattermoe 0.3.0.

Timed whole: its sort, GEMM, the model's own activation as one compiled function, GEMM, weighted sum. Its sort counts
by ``bincount``, which waits for the GPU, so that no CUDA graph can hold it: the host launches it. Weights are
(E, K, N) and (E, I, K), as views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.cli.contestants.contestant import Contestant, Inputs, load, versions_of
from compile_moe.cli.contestants.expert_weights import ExpertWeights

_INSTALL = "pip install git+https://github.com/shawntan/scattermoe"


def make(weights: ExpertWeights) -> Contestant:
    module = load("scattermoe.parallel_experts", _INSTALL)
    sort, linear = module.flatten_sort_count, module.parallel_linear
    activation = torch.compile(weights.function, dynamic=True)
    num_experts = weights.w1.size(0)
    w1, w2 = weights.w1.transpose(1, 2), weights.w2.transpose(1, 2)

    def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(inputs)

    def call(hidden_states: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        order = sort(ids, num_experts=num_experts)
        rows = linear(hidden_states, w1, ids.size(1), *order, expert_biases=weights.w1_bias, grouped_out=True)
        return linear(
            activation(rows),
            w2,
            1,
            *order,
            expert_biases=weights.w2_bias,
            gates=topk_weights,
            grouped_in=True,
        )

    return Contestant(arguments, call, replayable=False, versions=versions_of("scattermoe"))
