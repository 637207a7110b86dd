"""What a layer checks before it runs: tokens, weights, the router's choices, the space of ids, biases."""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.problem_size import (
    _moe_problem_size,
    check_bias,
    check_device,
    check_expert_map,
    check_float_dtype,
    check_ids,
    check_same,
    refuse_stored,
    require,
    require_int,
    require_type,
    shape,
)
from compile_moe.ops.weight_and_reduce import check_topk_weights


def check_call(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    apply_router_weight_on_input: bool,
) -> None:
    """Check what holds for a layer in any format of weights, before anything runs."""
    check_routing(hidden_states, w1, w2, topk_weights, topk_ids, expert_map)
    check_float_dtype("hidden_states", hidden_states)
    topk = topk_ids.size(1)
    require(
        not apply_router_weight_on_input or topk == 1,
        lambda: f"apply_router_weight_on_input needs topk = 1, got topk = {topk}; weight the outputs instead",
    )


def check_routing(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
) -> None:
    """Check tokens, in any dtype, against weights in any format and the router's choices."""
    require(
        hidden_states.dim() == 2,
        lambda: (
            f"hidden_states must be (M, K), got {shape(hidden_states)}; flatten the leading dimensions "
            "(the batched format (E, max_num_tokens, K) is what prepare makes of tokens)"
        ),
    )
    num_experts, m, _, k, topk = _moe_problem_size(hidden_states, w1, w2, topk_ids)
    require(
        num_experts >= 1, lambda: f"w1 and w2 must hold at least one expert, got {shape(w1)} and {shape(w2)}"
    )
    require(
        hidden_states.size(1) == k,
        lambda: (
            f"hidden_states (M, K), w1 (E, N, K) and w2 (E, K, I) must agree in K, got {shape(hidden_states)}, "
            f"{shape(w1)} and {shape(w2)}{_if_transposed(hidden_states, w1, w2)}"
        ),
    )
    check_ids(topk_ids)
    check_expert_map(expert_map, topk_ids)
    check_device("hidden_states", hidden_states, w1=w1, w2=w2, topk_ids=topk_ids)
    check_topk_weights(topk_weights, hidden_states)
    require(
        topk_weights.dim() == 2 and topk_weights.size(1) == topk and topk_weights.size(0) == m,
        lambda: f"topk_weights must have the shape of topk_ids, {shape(topk_ids)}, got {shape(topk_weights)}",
    )


def check_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_ids: Tensor,
    global_num_experts: int,
    expert_map: Tensor | None,
) -> None:
    """Check the tokens that experts with float weights get, their weights, and the space of the ids."""
    refuse_stored(w1=w1, w2=w2)
    k = w2.size(1)
    require(
        hidden_states.size(-1) == k and w1.size(2) == k,
        lambda: (
            f"hidden_states (M, K), w1 (E, N, K) and w2 (E, K, I) must agree in K, got {shape(hidden_states)}, "
            f"{shape(w1)} and {shape(w2)}{_if_transposed(hidden_states, w1, w2)}"
        ),
    )
    if not is_autocast(hidden_states.device.type):
        check_same("hidden_states", hidden_states, w1=w1, w2=w2)
    check_id_space(w1, topk_ids, global_num_experts, expert_map)


def _if_transposed(hidden_states: Tensor, w1: Tensor, w2: Tensor) -> str:
    """What to do, where the weights' last two dimensions would fit the other way round."""
    fits = hidden_states.size(-1) in (w1.size(1), w2.size(2))
    return "; weights stored as (E, K, N) and (E, I, K) go in as w.transpose(1, 2)" if fits else ""


def check_id_space(w1: Tensor, topk_ids: Tensor, global_num_experts: int, expert_map: Tensor | None) -> None:
    """Check the number of experts that the ids may name."""
    num_experts, topk = w1.size(0), topk_ids.size(1)
    require_int("global_num_experts", global_num_experts)
    num_global = num_experts if expert_map is None else expert_map.size(0)
    require(
        global_num_experts in (-1, num_global),
        lambda: (
            f"global_num_experts must be the length of expert_map, {num_global}, got {global_num_experts}"
            if expert_map is not None
            else f"global_num_experts must be w1's number of experts, {num_global}, where there is no expert_map, "
            f"got {global_num_experts}; pass the map from global to local ids"
        ),
    )
    require(
        topk <= num_global, lambda: f"topk must be at most the number of experts, {num_global}, got {topk}"
    )


def is_autocast(device_type: str) -> bool:
    # Devices without autocast raise in torch; dynamo can't trace is_autocast_available (torch 2.11).
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_biases(w1: Tensor, w2: Tensor, w1_bias: Tensor | None, w2_bias: Tensor | None) -> None:
    check_bias("w1_bias", w1_bias, "(E, N)", w1)
    check_bias("w2_bias", w2_bias, "(E, K)", w2)


def check_intermediate(w1: Tensor, w2: Tensor, activation: object, gated: bool, packed: int = 1) -> None:
    """Check w1's N against w2's I, of which an element of w2 holds ``packed``."""
    n, i = w1.size(1), w2.size(2) * packed
    if packed > 1:
        require_type(
            not (w1.dtype.is_floating_point or w2.dtype.is_floating_point),
            lambda: (
                f"w1 and w2 must hold {packed} numbers in an element of uint8, got {w1.dtype} and {w2.dtype}; quantize "
                "them with compile_moe.quantize_weights, or leave out the quant_config"
            ),
        )
    require(
        n == (2 * i if gated else i),
        lambda: (
            f"w1 (E, N, K) must have N = {'2 * I' if gated else 'I'} for w2 (E, K, I), since {_called(activation)} "
            f"maps N columns to {'N / 2' if gated else 'N'}, got {shape(w1)} and {shape(w2)}"
            f"{f', which holds {packed} columns in an element' if packed > 1 else ''}"
        ),
    )


def _called(activation: object) -> str:
    """In an error: the program of a callable says nothing to who wrote it."""
    return "the activation" if ";" in str(activation) else f"activation {activation!r}"
