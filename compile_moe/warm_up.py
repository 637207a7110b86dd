"""Compile and load kernels ahead of a CUDA graph capture."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike, resolve_activation
from compile_moe.dtensor_weights import local_tensors
from compile_moe.fused_experts import fused_experts
from compile_moe.ops.one_token_experts import one_token_experts, serves
from compile_moe.ops.quantize_tokens import quantize_tokens
from compile_moe.ops.quantized_one_token_experts import quantized_one_token_experts
from compile_moe.ops.quantized_one_token_experts import serves as serves_quantized
from compile_moe.ops.registry import loading_everything
from compile_moe.quant_config import FusedMoEQuantConfig


def warm_up(
    w1: Tensor,
    w2: Tensor,
    topk: int,
    *,
    activation: ActivationLike = "silu",
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    ids_dtype: torch.dtype = torch.int64,
    weights_dtype: torch.dtype = torch.float32,
    quant_config: FusedMoEQuantConfig | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Compile and load every kernel that ``fused_experts`` with these weights can launch, for any number of tokens.

    Small calls of the layer, of contiguous tokens at an address that 16 divides, as torch allocates them. Inside a
    CUDA graph capture nothing may compile, so call this, or the layer itself with at least as many tokens, before
    capturing. Layers in the batched format launch other kernels: call them once instead.

    Args:
        w1, w2, w1_bias, w2_bias, activation, expert_map, quant_config: as for :func:`compile_moe.fused_experts`.
        topk: experts per token.
        ids_dtype, weights_dtype: dtypes of the router's topk_ids and topk_weights.
        dtype: of the tokens; None for that of w1, or bfloat16 if that is quantized.
    """
    if dtype is None:
        dtype = w1.dtype if quant_config is None else torch.bfloat16
    hidden_states = w1.new_zeros((2, w2.size(1)), dtype=dtype)
    topk_ids = torch.zeros((2, topk), dtype=ids_dtype, device=w1.device)
    topk_weights = torch.zeros((2, topk), dtype=weights_dtype, device=w1.device)
    with torch.no_grad(), loading_everything():
        fused_experts(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation=activation,
            expert_map=expert_map,
            w1_bias=w1_bias,
            w2_bias=w2_bias,
            quant_config=quant_config,
        )
        _load_one_token(
            hidden_states[:1],
            w1,
            w2,
            topk_weights[:1],
            topk_ids[:1],
            expert_map,
            w1_bias,
            w2_bias,
            activation,
            quant_config,
        )


def _load_one_token(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    activation: ActivationLike,
    quant_config: FusedMoEQuantConfig | None,
) -> None:
    """Load what compiled graphs of one token call, unless they compile an activation of their own."""
    w1, w2, w1_bias, w2_bias = local_tensors(
        None, ("w1", w1), ("w2", w2), ("w1_bias", w1_bias), ("w2_bias", w2_bias)
    )
    resolved = resolve_activation(activation, w1.size(1), hidden_states)
    if resolved.function is not None:
        return
    router, topk = (topk_weights, topk_ids), topk_ids.size(1)
    options = expert_map, w1_bias, w2_bias, resolved.epilogue
    if quant_config is None:
        is_served = serves(hidden_states, w1, w2, topk)
        load = functools.partial(one_token_experts, hidden_states, w1, w2, *router, *options)
    else:
        q, facts = quant_config, quant_config.facts
        assert q.w1_scale is not None and q.w2_scale is not None, "fused_experts took them"
        form = facts.text, hidden_states.dtype
        tokens, scale, is_served = hidden_states, None, q.a2_scale is None  # the stages take static scales
        if is_served and facts.scaling:
            tokens, scale = quantize_tokens(hidden_states, facts.scaling)
        is_served = is_served and serves_quantized(tokens, w1, q.w1_scale, w2, q.w2_scale, topk, *form)
        weights = w1, q.w1_scale, q.w1_zp, w2, q.w2_scale, q.w2_zp
        load = functools.partial(
            quantized_one_token_experts, tokens, scale, *weights, *router, *form, *options
        )
    if is_served:
        for round_weights in (False, True):
            load(round_weights=round_weights)
