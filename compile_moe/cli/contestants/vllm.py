"""vLLM's Triton experts: ``fused_experts``, written against vllm 0.33.0.

Timed whole: block alignment, GEMM, activation, GEMM, sum, with the tile file that vLLM ships for this shape and GPU,
or its default tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compile_moe.cli.contestants.contestant import Contestant, Inputs, load, versions_of
from compile_moe.cli.contestants.expert_weights import ExpertWeights

_INSTALL = "pip install vllm"
_PACKAGE = "vllm.model_executor.layers.fused_moe"
#: vLLM's names are the same, and swigluoai's alpha and limit fixed.
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make(weights: ExpertWeights) -> Contestant:
    fused_experts = load(f"{_PACKAGE}.fused_moe", _INSTALL).fused_experts
    config = load(f"{_PACKAGE}.config", _INSTALL)
    activations = load(f"{_PACKAGE}.activation", _INSTALL).MoEActivation
    weights.require(_ACTIVATIONS, _DTYPES)
    options: dict[str, Any] = {"activation": activations(weights.activation)}
    if weights.w1_bias is not None:
        options["quant_config"] = config.biased_moe_quant_config(weights.w1_bias, weights.w2_bias)
    w1, w2 = weights.w1.contiguous(), weights.w2.contiguous()  # a copy where a model stores them transposed

    def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
        return inputs.hidden_states, inputs.weights.float(), inputs.ids.int()

    def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, **options)

    return Contestant(arguments, call, versions=versions_of("vllm"))
