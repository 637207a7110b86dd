"""The whole modular kernel as one op, expanding into its stages when compiled.

Args:
    hidden_states: (M, K), bf16, fp16 or fp32 (on CPU also float64).
    w1: (E, N, K), w2: (E, K, I), of hidden_states' dtype, any strides.
    topk_weights: (M, topk) floating point. topk_ids: (M, topk) int32 or int64.
    activation: name of an activation, or an epilogue's program text.
    global_num_experts: number of ids the router may use; -1 for E, or for the length of expert_map.
    expert_map: (global_num_experts,), global to local ids, -1 elsewhere.
    apply_router_weight_on_input: weight the tokens before GEMM 1 instead of the outputs; topk must be 1.
    w1_bias: (E, N), w2_bias: (E, K), or None.

Returns:
    (M, K) in hidden_states' dtype (in the autocast dtype under autocast, as torch's GEMMs). ``fused_moe_``
    writes it into hidden_states instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.gather_gemm import gather_gemm
from compile_moe.ops.named_activations import resolve
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
from compile_moe.ops.registry import define_composite, implementation
from compile_moe.ops.scatter_gemm import scatter_gemm
from compile_moe.ops.sort_tokens import sort_tokens
from compile_moe.ops.weight_and_reduce import check_topk_weights, weight_and_reduce


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


def run_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_ids: Tensor,
    epilogue: str,
    expert_map: Tensor | None,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    zero_skipped: bool,
) -> Tensor:
    """Token sort, GEMM 1 with its epilogue, GEMM 2: (M, topk, K), unweighted and unreduced."""
    sort = implementation(sort_tokens, topk_ids, expert_map)
    slots, offsets = sort(topk_ids, w1.size(0), expert_map)
    return run_gemms(
        hidden_states, w1, w2, slots, offsets, topk_ids.size(1), epilogue, w1_bias, w2_bias, zero_skipped
    )


def run_gemms(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    slots: Tensor,
    offsets: Tensor,
    topk: int,
    epilogue: str,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    zero_skipped: bool,
) -> Tensor:
    """GEMM 1 with its epilogue and GEMM 2 on tokens (M, K) in this order: (M, topk, K)."""
    tensors = hidden_states, w1, w2, slots, w1_bias, w2_bias
    gather, scatter = (implementation(op, *tensors) for op in (gather_gemm, scatter_gemm))
    intermediate = gather(hidden_states, w1, slots, offsets, topk, w1_bias, epilogue)
    return scatter(intermediate, w2, slots, offsets, hidden_states.size(0), topk, w2_bias, zero_skipped)


def weight_input(hidden_states: Tensor, topk_weights: Tensor) -> Tensor:
    """Tokens times their (only) router weight, rounded to the tokens' dtype."""
    return (hidden_states * topk_weights).to(hidden_states.dtype)


def _fused_out(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    global_num_experts: int,
    expert_map: Tensor | None,
    apply_router_weight_on_input: bool,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
) -> Tensor:
    check_call(hidden_states, w1, w2, topk_weights, topk_ids, expert_map, apply_router_weight_on_input)
    check_experts(hidden_states, w1, w2, topk_ids, global_num_experts, expert_map)
    epilogue = resolve(activation)
    check_intermediate(w1, w2, activation, not epilogue.startswith("ungated"))
    if apply_router_weight_on_input:
        hidden_states = weight_input(hidden_states, topk_weights)
    return run_experts(hidden_states, w1, w2, topk_ids, epilogue, expert_map, w1_bias, w2_bias, False)


def fused_moe_of_stages(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str = "silu",
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    """What the op is made of: calls of the stages."""
    fused_out = _fused_out(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        apply_router_weight_on_input,
        w1_bias,
        w2_bias,
    )
    reduce = implementation(weight_and_reduce, fused_out, topk_weights, topk_ids, expert_map)
    return reduce(fused_out, topk_weights, topk_ids, expert_map, w1.size(0), not apply_router_weight_on_input)


def write_reduced(
    output: Tensor,
    fused_out: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor | None,
    expert_map: Tensor | None,
    num_experts: int,
    apply_weights: bool,
) -> None:
    """Finalize into ``output`` (M, K), any dtype and strides."""
    # What traces wraps tensors; torch 2.11 doesn't say that it compiles while it expands an op.
    traced = torch.compiler.is_compiling() or type(output) is not Tensor
    if not traced and output.dtype is fused_out.dtype and output.is_contiguous():
        torch.ops.compile_moe.weight_and_reduce.out(
            fused_out, topk_weights, topk_ids, expert_map, num_experts, apply_weights, out=output
        )
        return
    # In a graph the functional op fuses, copy included; the mutating overload would be opaque.
    output.copy_(weight_and_reduce(fused_out, topk_weights, topk_ids, expert_map, num_experts, apply_weights))


def _fused_moe_(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str = "silu",
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> None:
    fused_out = _fused_out(
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        apply_router_weight_on_input,
        w1_bias,
        w2_bias,
    )
    write_reduced(
        hidden_states,
        fused_out,
        topk_weights,
        topk_ids,
        expert_map,
        w1.size(0),
        not apply_router_weight_on_input,
    )


_ARGUMENTS = (
    "Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, "
    'str activation="silu", SymInt global_num_experts=-1, Tensor? expert_map=None, '
    "bool apply_router_weight_on_input=False, Tensor? w1_bias=None, Tensor? w2_bias=None"
)
fused_moe = define_composite(
    "fused_moe", f"Tensor hidden_states, {_ARGUMENTS}", "Tensor", fused_moe_of_stages
)
fused_moe_ = define_composite("fused_moe_", f"Tensor(a!) hidden_states, {_ARGUMENTS}", "()", _fused_moe_)
