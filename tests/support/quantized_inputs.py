"""One list of inputs for the ops of quantized layers."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from compile_moe.ops.named_activations import program_text
from compile_moe.ops.sort_tokens import sort_tokens_torch
from compile_moe.quantization import TokenScaling
from tests.support.quantized import Quantized

STAGES = (
    "quantize_tokens",
    "quantized_gather_gemm",
    "quantized_scatter_gemm",
    "quantized_grouped_linear",
    "quantized_one_token_experts",
)


def op(name: str) -> torch._ops.OpOverload:
    overload: torch._ops.OpOverload = getattr(torch.ops.compile_moe, name).default
    return overload


def stage_inputs(q: Quantized) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op for one layer. Skipped slots hold zeros: opcheck compares all."""
    layer, scheme = q.layer, q.variant.made
    x, ids, dtype = layer.hidden_states, layer.topk_ids, layer.hidden_states.dtype
    m, topk = ids.shape
    slots, offsets = sort_tokens_torch(ids, layer.w1.size(0), layer.expert_map)
    rows = torch.randn(m * topk, layer.w2.size(2)).to(dtype)
    scaling = scheme.token_scaling or TokenScaling(torch.int8, "token")
    tokens: tuple[Tensor, Tensor | None] = (x, None)
    between: tuple[Tensor, Tensor | None] = (rows, None)
    if scheme.token_scaling is not None:
        tokens, between = scaling.quantize(x, q.a1_scale), scaling.quantize(rows, q.a2_scale)
    common = (scheme.text, dtype)
    epilogue = program_text(layer.activation)
    one, *router = x[:1], layer.topk_weights[:1], ids[:1]
    if not m:
        one, *router = torch.randn(1, x.size(1)).to(dtype), torch.ones(1, topk), torch.arange(topk)[None]
    token = scaling.quantize(one, q.a1_scale) if scheme.token_scaling is not None else (one, None)
    return {
        "quantize_tokens": (x, scaling.text, q.a1_scale),
        "quantized_gather_gemm": (
            *(*tokens, *q.q1, slots, offsets, topk, *common),
            *(layer.w1_bias, epilogue, True),
        ),
        "quantized_scatter_gemm": (*between, *q.q2, slots, offsets, m, topk, *common, layer.w2_bias, True),
        "quantized_grouped_linear": (*between, *q.q2, offsets, *common, layer.w2_bias),
        "quantized_one_token_experts": (
            *(*token, *q.q1, *q.q2, *router, *common),
            *(layer.expert_map, layer.w1_bias, layer.w2_bias, epilogue, True, True),
        ),
    }


def opcheck(overload: torch._ops.OpOverload, *arguments: Any) -> None:
    """``torch.library.opcheck``, which finds out whether an op changed its arguments by ``torch.allclose``: that has no
    float8.
    """
    allclose = torch.allclose

    def with_float8(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> bool:
        if a.dtype is torch.float8_e4m3fn:
            a, b = a.float(), b.float()
        return allclose(a, b, *args, **kwargs)

    with patch("torch.allclose", with_float8):
        torch.library.opcheck(overload, *arguments)
