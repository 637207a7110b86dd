"""The layer's input as the experts want it: weighted if asked, then quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.fused_moe import weight_input
from compile_moe.ops.layer_checks import is_autocast
from compile_moe.ops.problem_size import require, shape
from compile_moe.ops.quantize_tokens import quantize_tokens
from compile_moe.quant_config import FusedMoEQuantConfig, check_static_scale, given_once, refuse_scales


def quantized_input(
    class_name: str,
    config: FusedMoEQuantConfig | None,
    a1: Tensor,
    a1_scale: Tensor | None,
    a2_scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    apply_router_weight_on_input: bool,
) -> tuple[Tensor, Tensor | None]:
    """Tokens (M, K) and their scales (1,), or (M, scales of a token), or None where the scheme leaves them alone.

    Under autocast they are cast to its dtype first, where there is a config.

    Raises:
        ValueError: arguments that don't fit together, or scales that the config doesn't have.
    """
    if config is None:
        refuse_scales(class_name, a1_scale=a1_scale, a2_scale=a2_scale)
    require(a1.dim() == 2, lambda: f"a1 must be (M, K), got {shape(a1)}")
    if apply_router_weight_on_input:
        topk = topk_ids.size(1)
        require(topk == 1, lambda: f"apply_router_weight_on_input needs topk = 1, got topk = {topk}")
        a1 = weight_input(a1, topk_weights)
    if config is None:
        return a1, None
    facts = config.facts
    a1_scale = given_once("a1_scale", a1_scale, config.a1_scale)
    a2_scale = given_once("a2_scale", a2_scale, config.a2_scale)
    check_static_scale(facts, "a1_scale", a1_scale)
    check_static_scale(facts, "a2_scale", a2_scale)
    if (a1_scale is None) != (a2_scale is None):
        given = "a1_scale" if a2_scale is None else "a2_scale"
        raise ValueError(
            f"a1_scale and a2_scale must be given both (static) or neither (dynamic), got {given} only: both GEMMs "
            "are quantized alike"
        )
    a1 = in_autocast_dtype(a1)
    if not facts.scaling:
        return a1, None
    # One scale for all: a token is quantized before it is known where it goes.
    if a1_scale is not None and a1_scale.numel() > 1:
        a1_scale = a1_scale.amax()
    static = None if a1_scale is None else a1_scale.reshape(1)
    quantized, scales = quantize_tokens(a1, facts.scaling, static)
    # A given scale is not copied, as the op has to.
    return quantized, scales if static is None else static


def in_autocast_dtype(tokens: Tensor) -> Tensor:
    """Tokens as the GEMMs would cast them."""
    device_type = tokens.device.type
    if is_autocast(device_type) and tokens.dtype is not torch.float64:
        return tokens.to(torch.get_autocast_dtype(device_type))
    return tokens
