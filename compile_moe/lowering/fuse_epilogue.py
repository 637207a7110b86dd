"""A pass that moves pointwise operations behind GEMM 1 into its epilogue.

An activation that reached :func:`compile_moe.fused_experts` as an argument is in the epilogue already. This pass finds
those that a model wrote between the two GEMMs itself: by overriding ``activation`` of an experts class, or by calling
the ops. It takes the largest region of pointwise operations behind ``gather_gemm`` that ends in one value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compile_moe.ops.aten_vocabulary import (
    described,
    is_constant,
    is_slice,
    is_translatable,
    tensor_inputs,
)
from compile_moe.ops.gather_gemm import gather_gemm
from compile_moe.ops.graph_to_epilogue import GraphToEpilogue, NotPointwise
from compile_moe.ops.scatter_gemm import scatter_gemm

#: Why the pass left a GEMM alone, newest last; for those who want to explain a graph.
refusals: list[str] = []
_MOST_REFUSALS = 100

_ARGUMENTS = (
    "hidden_states",
    "w1",
    "sorted_slots",
    "expert_offsets",
    "topk",
    "bias",
    "epilogue",
    "zero_skipped",
)


def fuse_epilogue(graph: fx.Graph) -> None:
    """Rewrite every ``gather_gemm`` of ``graph`` whose region behind it an epilogue can hold."""
    for gemm in graph.find_nodes(op="call_function", target=gather_gemm):
        arguments = dict(zip(_ARGUMENTS, gemm.args, strict=False)) | gemm.kwargs
        if arguments.get("epilogue", ""):
            continue
        try:
            _fuse(graph, gemm, arguments)
        except NotPointwise as refusal:
            refusals.append(f"activation behind {gemm.name}: {refusal}")
            del refusals[:-_MOST_REFUSALS]


def _fuse(graph: fx.Graph, gemm: fx.Node, arguments: dict[str, Any]) -> None:
    num_columns = gemm.meta["val"].shape[1]
    if not isinstance(num_columns, int):
        raise NotPointwise(f"w1 has a dynamic number of columns, {num_columns}")
    end, region = _region(gemm)
    read_by_scatter_only = all(user.target is scatter_gemm and user.args[0] is end for user in end.users)
    if arguments.get("zero_skipped", False) and not read_by_scatter_only:
        # Rows of skipped slots would hold zeros instead of the activation of zeros.
        raise NotPointwise(f"{described(end)} has users that may read the rows of skipped slots")
    program = GraphToEpilogue(num_columns, gemm.meta["val"].shape[0]).program(_subgraph(gemm, region, end))
    # Where the GEMM stood: sizes are read off it before the region ends.
    with graph.inserting_before(gemm):
        fused = graph.call_function(gather_gemm, kwargs={**arguments, "epilogue": program.text()})
    fused.meta.update(end.meta)
    end.replace_all_uses_with(fused)
    for user in filter(_reads_rows, tuple(gemm.users)):
        user.replace_input_with(gemm, fused)
    for node in (*reversed(region), gemm):
        if not node.users:
            graph.erase_node(node)


def _region(gemm: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The last value of the GEMM's dtype behind which nothing of the region is used; all nodes up to it, in order."""
    reached: dict[fx.Node, None] = {gemm: None}
    constants: set[fx.Node] = set()
    stopped = ""
    for node in gemm.graph.nodes:
        inputs = tensor_inputs(node)
        sources = [source for source in inputs if source not in constants]
        if is_constant(node) or (inputs and not sources and is_translatable(node)):
            constants.add(node)
        elif _reads_rows(node):
            continue
        elif sources and all(source in reached for source in sources):
            if is_translatable(node):
                reached[node] = None
            elif not stopped:
                stopped = f"{described(node)} is not a pointwise operation an epilogue can hold"
        elif any(source in reached for source in sources) and not stopped:
            stopped = f"{described(node)} takes other tensors"
    for end in reversed(reached):
        if end is gemm:
            break
        if is_slice(end) or end.meta["val"].dtype is not gemm.meta["val"].dtype:
            continue
        before_end = _ancestors(end, gemm)
        inside = {*before_end, end}
        users = {user for source in (gemm, *(before_end - constants)) for user in source.users}
        if all(user in inside or _reads_rows(user) for user in users):
            return end, [node for node in gemm.graph.nodes if node in inside]
    raise NotPointwise(stopped or "nothing follows it")


def _reads_rows(node: fx.Node) -> bool:
    """Whether ``node`` is a number of rows, which an epilogue leaves as it is."""
    return bool(node.target is torch.ops.aten.sym_size.int and node.args[1] == 0)


def _ancestors(end: fx.Node, gemm: fx.Node) -> set[fx.Node]:
    """What ``end`` is computed from, up to the GEMM."""
    found: set[fx.Node] = set()
    pending = [end]
    while pending:
        for source in tensor_inputs(pending.pop()):
            if source is not gemm and source not in found:
                found.add(source)
                pending.append(source)
    return found


def _subgraph(gemm: fx.Node, region: list[fx.Node], end: fx.Node) -> fx.Graph:
    """The region as a function of GEMM 1's result."""
    subgraph = fx.Graph()
    placeholder = subgraph.placeholder("gate_up")
    placeholder.meta = dict(gemm.meta)
    copies = {gemm: placeholder}
    for node in region:
        # Not there: the size of a constant, which doesn't matter.
        copies[node] = subgraph.node_copy(node, lambda source: copies.get(source, 0))
        copies[node].meta = dict(node.meta)
    subgraph.output(copies[end])
    return subgraph
