"""SonicMoE's kernels (CuTe DSL, for Hopper and Blackwell): ``moe_general_routing_inputs``, written against sonic-moe
0.1.2.post1.

Timed whole: routing metadata, GEMM with its activation, GEMM, weighted sum. w1 is (2I, K, E) with gate and up
alternating and w2 (K, I, E), both views with K and I innermost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.cli.contestants.contestant import Contestant, Inputs, load, versions_of
from compile_moe.cli.contestants.expert_weights import ExpertWeights, interleaved

_INSTALL = "pip install sonic-moe"


def make(weights: ExpertWeights) -> Contestant:
    routed = load("sonicmoe.functional", _INSTALL).moe_general_routing_inputs
    swiglu = load("sonicmoe.enums", _INSTALL).ActivationType.SWIGLU
    weights.require(("silu",), (torch.bfloat16, torch.float16))
    num_experts = weights.w1.size(0)
    w1 = interleaved(weights.w1).permute(1, 2, 0)
    w2 = weights.w2.contiguous().permute(1, 2, 0)
    b1 = None if weights.w1_bias is None else interleaved(weights.w1_bias)
    b2 = weights.w2_bias

    def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
        hidden_states, ids, topk_weights = inputs
        tokens = torch.arange(ids.size(0), dtype=torch.int32, device=ids.device).repeat_interleave(
            ids.size(1)
        )
        return hidden_states, topk_weights.float().flatten(), tokens, ids.int().flatten()

    def call(hidden_states: Tensor, scores: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
        device = hidden_states.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        weighted, _ = routed(
            hidden_states,
            scores,
            tokens,
            ids,
            w1,
            b1,
            w2,
            b2,
            num_experts,
            stream,
            swiglu,
            is_inference_mode_enabled=True,
        )
        return weighted

    return Contestant(arguments, call, versions=versions_of("sonic-moe"))
