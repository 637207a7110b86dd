"""A pass that puts ``one_token_experts`` or ``quantized_one_token_experts`` in the place of the stages of a layer of
one token.

Dynamo compiles a graph of its own for one token, so that the number is known here, and what a model wrote between the
stages is in GEMM 1's epilogue by now.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
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
from compile_moe.ops.quantize_tokens import quantize_tokens
from compile_moe.ops.quantized_gather_gemm import quantized_gather_gemm
from compile_moe.ops.quantized_one_token_experts import quantized_one_token_experts
from compile_moe.ops.quantized_one_token_experts import serves as serves_quantized
from compile_moe.ops.quantized_scatter_gemm import quantized_scatter_gemm
from compile_moe.ops.scatter_gemm import scatter_gemm
from compile_moe.ops.sort_tokens import sort_tokens
from compile_moe.ops.weight_and_reduce import weight_and_reduce
from compile_moe.quantization import parse_scheme


def use_one_token_experts(graph: fx.Graph) -> None:
    """Rewrite every layer of ``graph`` that one of the ops serves."""
    for reduce in graph.find_nodes(op="call_function", target=weight_and_reduce):
        layer = _layer_before(reduce)
        if layer is None:
            continue
        op = _op_for(layer)
        if op is None:
            continue
        weights, dtype = layer.arguments["topk_weights"], value_of(reduce).dtype
        # Rounded by the kernel, not by one of its own.
        round_weights = weights.target is CAST and value_of(weights).dtype is dtype
        given = layer.arguments | {
            "topk_weights": before_cast(weights) if round_weights else weights,
            "round_weights": round_weights,
        }
        parameters = op._schema.arguments
        required = [given[p.name] for p in parameters if not p.has_default_value()]
        options = {p.name: given[p.name] for p in parameters if p.has_default_value()}
        with graph.inserting_before(reduce):
            experts = call(graph, op, required, options, reduce)
        reduce.replace_all_uses_with(experts)
        erase_unused(graph, {reduce, *layer.stages, weights})


class _Layer(NamedTuple):
    """arguments: those of the stages by name, with the biases as ``w1_bias`` and ``w2_bias``; a scheme if quantized."""

    arguments: dict[str, Any]
    stages: tuple[fx.Node, ...]


def _op_for(layer: _Layer) -> torch._ops.OpOverload | None:
    """The op that is the faster way, if one is."""
    arguments = layer.arguments
    values = {name: value_of(a) for name, a in arguments.items() if isinstance(a, fx.Node)}
    x, w1, w2, topk = values["hidden_states"], values["w1"], values["w2"], values["topk_ids"].size(1)
    if "scheme" not in arguments:
        op, is_served = one_token_experts, serves(x, w1, w2, topk)
    else:
        op, scales = quantized_one_token_experts, (values["w1_scale"], values["w2_scale"])
        options = arguments["scheme"], arguments["out_dtype"]
        is_served = serves_quantized(x, w1, scales[0], w2, scales[1], topk, *options)
    # What the stages leave to their caller, and the ops refuse.
    is_layer = is_served and w2.size(1) == x.size(1) and topk <= values.get("expert_map", w1).size(0)
    return op if is_layer else None


def _layer_before(reduce: fx.Node) -> _Layer | None:
    """The layer that ``reduce`` ends, if its slots are of one sort and nothing else reads what lies between."""
    final = arguments_of(reduce, weight_and_reduce)
    down = _either(final and final["fused_out"], scatter_gemm, quantized_scatter_gemm)
    rows = down and _rows_between(down)
    up = _either(rows and rows[-1], gather_gemm, quantized_gather_gemm)
    if final is None or down is None or rows is None or up is None:
        return None
    between = final["fused_out"], *rows
    slots, offsets = up["sorted_slots"], up["expert_offsets"]
    (sort, first), (same_sort, second) = (operands(node, operator.getitem) for node in (slots, offsets))
    order = arguments_of(sort, sort_tokens)
    if (
        order is None
        or any(len(node.users) != (2 if node.target is quantize_tokens else 1) for node in between)
        or (sort is not same_sort or (first, second) != (0, 1))
        or (down["sorted_slots"], down["expert_offsets"]) != (slots, offsets)
        or (final["topk_ids"], final["expert_map"]) != (order["topk_ids"], order["expert_map"])
        or final["num_experts"] != order["num_experts"]
        or not up["topk"] == down["topk"] == value_of(order["topk_ids"]).size(1)
        or up.get("scheme") != down.get("scheme")
        or up.get("out_dtype") is not down.get("out_dtype")
    ):
        return None
    arguments = {**up, **down, **final, "w1_bias": up["bias"], "w2_bias": down["bias"]}
    return _Layer(arguments, (*between, slots, offsets, sort))


def _either(node: Any, *ops: torch._ops.OpOverload) -> dict[str, Any] | None:
    """The arguments of a call of one of ``ops``."""
    return next((found for op in ops if (found := arguments_of(node, op)) is not None), None)


def _rows_between(down: dict[str, Any]) -> tuple[fx.Node, ...] | None:
    """What GEMM 2 reads of GEMM 1's result, back to that: scales and numbers that ``quantize_tokens`` computes from it,
    if the scheme quantizes tokens. None if it is quantized in another way.
    """
    rows = down["intermediate"]
    scaling = parse_scheme(down["scheme"]).token_scaling if "scheme" in down else None
    if scaling is None:
        return (rows,)
    scales = down["intermediate_scale"]
    (quantize, first), (same, second) = (operands(node, operator.getitem) for node in (rows, scales))
    given = arguments_of(quantize, quantize_tokens)
    if given is None or quantize is not same or (first, second) != (0, 1) or given["scaling"] != scaling.text:
        return None
    # Static scales, for one, stay with the stages.
    has_more = any(given[name] is not None for name in ("scale", "maxima", "expert_offsets"))
    return None if has_more else (scales, rows, quantize, given["tokens"])
