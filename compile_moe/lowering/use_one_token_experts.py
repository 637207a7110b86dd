"""A pass that puts ``one_token_experts`` in the place of the stages of a layer of one token.

Dynamo compiles a graph of its own for one token, so that the number is known here, and what a model wrote between the
stages is in GEMM 1's epilogue by now.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

from torch import fx

from compile_moe.lowering.graph_edits import (
    CAST,
    arguments_of,
    before_cast,
    call,
    erase_unused,
    operands,
    value_of,
)
from compile_moe.ops.gather_gemm import gather_gemm
from compile_moe.ops.one_token_experts import one_token_experts, serves
from compile_moe.ops.scatter_gemm import scatter_gemm
from compile_moe.ops.sort_tokens import sort_tokens
from compile_moe.ops.weight_and_reduce import weight_and_reduce


def use_one_token_experts(graph: fx.Graph) -> None:
    """Rewrite every layer of ``graph`` that the op serves."""
    for reduce in graph.find_nodes(op="call_function", target=weight_and_reduce):
        layer = _layer_before(reduce)
        if layer is None:
            continue
        x, w1, w2, ids = map(value_of, (layer.hidden_states, layer.w1, layer.w2, layer.topk_ids))
        if not serves(x, w1, w2, ids.size(1)):
            continue
        weights = layer.topk_weights
        # Rounded by the kernel, not by one of its own.
        round_weights = weights.target is CAST and value_of(weights).dtype is x.dtype
        if round_weights:
            weights = before_cast(weights)
        arguments = (layer.hidden_states, layer.w1, layer.w2, weights, layer.topk_ids)
        options = {
            "expert_map": layer.expert_map,
            "w1_bias": layer.w1_bias,
            "w2_bias": layer.w2_bias,
            "epilogue": layer.epilogue,
            "apply_weights": layer.apply_weights,
            "round_weights": round_weights,
        }
        with graph.inserting_before(reduce):
            experts = call(graph, one_token_experts, arguments, options, reduce)
        reduce.replace_all_uses_with(experts)
        erase_unused(graph, {reduce, *layer.stages, layer.topk_weights})


class _Layer(NamedTuple):
    hidden_states: fx.Node
    w1: fx.Node
    w2: fx.Node
    topk_weights: fx.Node
    topk_ids: fx.Node
    expert_map: fx.Node | None
    w1_bias: fx.Node | None
    w2_bias: fx.Node | None
    epilogue: str
    apply_weights: bool
    stages: tuple[fx.Node, ...]


def _layer_before(reduce: fx.Node) -> _Layer | None:
    """The layer that ``reduce`` ends, if its slots are of one sort and nothing else reads what lies between."""
    final = arguments_of(reduce, weight_and_reduce)
    down = arguments_of(final and final["fused_out"], scatter_gemm)
    up = arguments_of(down and down["intermediate"], gather_gemm)
    if final is None or down is None or up is None:
        return None
    between = final["fused_out"], down["intermediate"]
    slots, offsets = up["sorted_slots"], up["expert_offsets"]
    (sort, first), (same_sort, second) = (operands(node, operator.getitem) for node in (slots, offsets))
    order = arguments_of(sort, sort_tokens)
    if (
        order is None
        or any(len(node.users) != 1 for node in between)
        or (sort is not same_sort or (first, second) != (0, 1))
        or (down["sorted_slots"], down["expert_offsets"]) != (slots, offsets)
        or (final["topk_ids"], final["expert_map"]) != (order["topk_ids"], order["expert_map"])
        or final["num_experts"] != order["num_experts"]
        or not up["topk"] == down["topk"] == value_of(order["topk_ids"]).size(1)
    ):
        return None
    return _Layer(
        up["hidden_states"],
        up["w1"],
        down["w2"],
        final["topk_weights"],
        order["topk_ids"],
        order["expert_map"],
        up["bias"],
        down["bias"],
        up["epilogue"],
        final["apply_weights"],
        (*between, slots, offsets, sort),
    )
