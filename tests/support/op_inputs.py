"""One list of inputs for every op: what opcheck, the out overloads and the fake-equals-real test go through."""

from __future__ import annotations

from typing import Any

import torch

from compile_moe.ops.named_activations import program_text
from compile_moe.ops.sort_tokens import sort_tokens_torch
from tests.support.oracle import CASES, Layer, make_layer

OP_CASES = {
    **{
        name: CASES[name]
        for name in (
            "plain",
            "M0",
            "M1",
            "M1-topk1-on-input",
            "odd",
            "transposed",
            "biased",
            "transposed-biased-swigluoai",
            "mapped-int32-biased",
            "skipped",
            "strided",
            "ungated",
        )
    },
    "bf16": {"dtype": torch.bfloat16},
}


def stage_inputs(layer: Layer) -> dict[str, tuple[Any, ...]]:
    """Arguments of each functional op, by its name, for one layer. Skipped slots hold zeros: opcheck compares all."""
    x, w1, w2, weights, ids = layer.args
    m, topk = ids.shape
    epilogue = program_text(layer.activation)
    slots, offsets = sort_tokens_torch(ids, w1.size(0), layer.expert_map)
    gate_up = torch.randn(m * topk, w1.size(1), device=x.device).to(x.dtype)
    rows = torch.randn(m * topk, w2.size(2), device=x.device).to(x.dtype)
    fused_out = torch.randn(m, topk, w2.size(1), device=x.device).to(x.dtype)
    num_experts = w1.size(0)
    logits = torch.randn(m, num_experts, device=x.device).to(x.dtype)
    bias = torch.rand(num_experts, device=x.device)
    router = (logits, min(topk, num_experts), "sigmoid", bias, 1, 1, True, 2.5, 1e-6, 0.5)
    return {
        "route_tokens": router,
        "route_and_sort_tokens": router,
        "sort_tokens": (ids, w1.size(0), layer.expert_map),
        "gather_gemm": (x, w1, slots, offsets, topk, layer.w1_bias, epilogue, True),
        "act_and_mul": (gate_up, epilogue),
        "scatter_gemm": (rows, w2, slots, offsets, m, topk, layer.w2_bias, True),
        "weight_and_reduce": (fused_out, weights, ids, layer.expert_map, w1.size(0), True),
        "grouped_linear": (rows, w2, offsets, layer.w2_bias),
        "fused_moe": (
            x,
            w1,
            w2,
            weights,
            ids,
            layer.activation,
            -1,
            layer.expert_map,
            layer.apply_router_weight_on_input,
            layer.w1_bias,
            layer.w2_bias,
        ),
    }


STAGES = tuple(stage_inputs(make_layer()))
