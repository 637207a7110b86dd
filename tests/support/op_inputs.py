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
    # Every expert gets a token more than it has rows for, so that all rows are written: opcheck compares all.
    tokens = torch.randn(m + 1, w2.size(1), device=x.device).to(x.dtype)
    to_all = sort_tokens_torch(torch.arange(topk, device=x.device).expand(m + 1, topk), topk)
    batch = torch.randn(num_experts, 3, w2.size(1), device=x.device).to(x.dtype)
    batch_rows = torch.randint(-1, num_experts * 3, (m, topk), dtype=torch.int32, device=x.device)
    counts = torch.arange(-1, num_experts - 1, dtype=torch.int32, device=x.device)
    router = (logits, min(topk, num_experts), "sigmoid", bias, 1, 1, True, 2.5, 1e-6, 0.5)
    return {
        "route_tokens": router,
        "route_and_sort_tokens": router,
        "sort_tokens": (ids, w1.size(0), layer.expert_map),
        "gather_gemm": (x, w1, slots, offsets, topk, layer.w1_bias, epilogue, True),
        "act_and_mul": (gate_up, epilogue),
        "scatter_gemm": (rows, w2, slots, offsets, m, topk, layer.w2_bias, True),
        "weight_and_reduce": (fused_out, weights, ids, layer.expert_map, w1.size(0), True),
        "one_token_experts": (
            tokens[:1],
            w1,
            w2,
            weights[:1] if m else torch.ones(1, topk, device=x.device),
            ids[:1] if m else torch.arange(topk, device=x.device)[None],
            layer.expert_map,
            layer.w1_bias,
            layer.w2_bias,
            epilogue,
            True,
            True,
        ),
        "sort_batch": (counts, 3),
        "batch_tokens": (tokens, *to_all, topk, max(1, m)),
        "reduce_batch": (batch, weights, batch_rows, True),
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
