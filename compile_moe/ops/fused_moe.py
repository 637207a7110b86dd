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
from compile_moe.ops.layer_checks import check_call, check_experts, check_intermediate
from compile_moe.ops.named_activations import resolve
from compile_moe.ops.registry import define_composite, implementation
from compile_moe.ops.scatter_gemm import scatter_gemm
from compile_moe.ops.sort_tokens import sort_tokens
from compile_moe.ops.weight_and_reduce import weight_and_reduce


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
