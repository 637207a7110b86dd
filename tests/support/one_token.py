"""A layer of one token through the op that compiled graphs call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compile_moe.ops import one_token_experts
from compile_moe.ops.fused_moe import weight_input
from compile_moe.ops.named_activations import program_text
from tests.support.oracle import Layer


def arguments_of(layer: Layer, round_weights: bool = False) -> tuple[Any, ...]:
    """Arguments of the op, whose weights the layer has rounded if they are rounded."""
    x, w1, w2, weights, ids = layer.args
    on_input = layer.apply_router_weight_on_input
    if on_input:
        x = weight_input(x, weights)
    program = program_text(layer.activation)
    return (
        x,
        w1,
        w2,
        weights,
        ids,
        layer.expert_map,
        layer.w1_bias,
        layer.w2_bias,
        program,
        not on_input,
        round_weights,
    )


def run_one_token(layer: Layer) -> Tensor:
    result: Tensor = one_token_experts(*arguments_of(layer))
    return result
