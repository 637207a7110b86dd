"""A pass that moves pointwise operations behind GEMM 1 into its epilogue.

An activation that reached :func:`compile_moe.fused_experts` as an argument is in the epilogue already. This pass finds
those that a model wrote between the two GEMMs itself: by overriding ``activation`` of an experts class, or by calling
the ops. It takes the largest region of pointwise operations behind ``gather_gemm`` that ends in one value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compile_moe.lowering.graph_edits import arguments_of
from compile_moe.lowering.refusals import Refusals
from compile_moe.ops.aten_vocabulary import (
    described,
    is_constant,
    is_translatable,
    tensor_inputs,
)
from compile_moe.ops.epilogue import Program
from compile_moe.ops.gather_gemm import gather_gemm
from compile_moe.ops.graph_to_epilogue import NotPointwise, program_of, sources_of
from compile_moe.ops.scatter_gemm import scatter_gemm

#: Why the pass left a GEMM alone, newest last; for those who want to explain a graph.
refusals = Refusals()


def fuse_epilogue(graph: fx.Graph) -> None:
    """Rewrite every ``gather_gemm`` of ``graph`` whose region behind it an epilogue can hold."""
    for gemm in graph.find_nodes(op="call_function", target=gather_gemm):
        arguments = arguments_of(gemm, gather_gemm)
        assert arguments is not None, "it is a call of gather_gemm"
        if arguments["epilogue"]:
            continue
        try:
            _fuse(graph, gemm, arguments)
        except NotPointwise as refusal:
            refusals.refuse(f"activation behind {gemm.name}: {refusal}")
    for gemm in graph.find_nodes(op="call_function", target=scatter_gemm):
        activated: Any = gemm.args[0]
        if is_constant(activated):
            refusals.refuse(
                f"activation in front of {gemm.name}: {described(activated)} reads no gate and no up"
            )


def _fuse(graph: fx.Graph, gemm: fx.Node, arguments: dict[str, Any]) -> None:
    num_columns = gemm.meta["val"].shape[1]
    if not isinstance(num_columns, int):
        raise NotPointwise(f"w1 has a dynamic number of columns, {num_columns}")
    end, program = _largest_region(gemm)
    read_by_scatter_only = all(user.target is scatter_gemm and user.args[0] is end for user in end.users)
    if arguments["zero_skipped"] and not read_by_scatter_only:
        # Rows of skipped slots would hold zeros instead of the activation of zeros.
        raise NotPointwise(f"{described(end)} has users that may read the rows of skipped slots")
    region = _in_order(graph, {*sources_of(end, gemm), end})
    # Where the GEMM stood: sizes are read off it before the region ends.
    with graph.inserting_before(gemm):
        fused = graph.call_function(gather_gemm, kwargs={**arguments, "epilogue": program.text()})
    fused.meta.update(end.meta)
    end.replace_all_uses_with(fused)
    if not end.meta["val"].is_contiguous():
        _make_contiguous(fused)
    for node in (gemm, *region):
        for user in filter(_reads_rows, tuple(node.users)):
            user.replace_input_with(node, fused)
    for node in (*reversed(region), gemm):
        if not node.users:
            graph.erase_node(node)


def _make_contiguous(fused: fx.Node) -> None:
    """Let nobody copy the rows to have the strides of the view in whose place they are."""
    rows = fused.meta["val"].new_empty(fused.meta["val"].shape)
    fused.meta["val"] = rows
    for user in fused.users:
        if user.target is scatter_gemm and "eager_input_vals" in user.meta:
            (_, *others), named = user.meta["eager_input_vals"]
            user.meta["eager_input_vals"] = (rows, *others), named


def _largest_region(gemm: fx.Node) -> tuple[fx.Node, Program]:
    """The last value of the GEMM's dtype that an epilogue can compute, behind which nothing else that it needs is
    used; and its program.
    """
    reached, constants, stopped = _reached(gemm)
    refused = ""
    for end in reversed(reached):
        if getattr(end.meta["val"], "dtype", None) is not gemm.meta["val"].dtype:
            continue
        before_end = sources_of(end, gemm)
        inside = {*before_end, end}
        users = {user for source in (gemm, *(before_end - constants)) for user in source.users}
        if not all(user in inside or _reads_rows(user) for user in users):
            continue
        is_view = not end.meta["val"].is_contiguous()
        if is_view and any(user.target is not scatter_gemm for user in end.users):
            # Who else reads a view may look at its strides, or behind it.
            continue
        try:
            program = program_of(gemm, end)
        except NotPointwise as refusal:
            refused = refused or str(refusal)
            continue
        if program.gated or program.steps:
            return end, program
    raise NotPointwise(refused or stopped or "nothing follows it")


def _reached(gemm: fx.Node) -> tuple[list[fx.Node], set[fx.Node], str]:
    """What is computed from the GEMM and constants, in order; these constants; and the first node that is not."""
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
        elif any(source in reached for source in sources) and node.target is not scatter_gemm and not stopped:
            stopped = f"{described(node)} takes other tensors"
    return list(reached)[1:], constants, stopped


def _reads_rows(node: fx.Node) -> bool:
    """Whether ``node`` is a number of rows, which an epilogue leaves as it is; of columns there is a static one."""
    return bool(node.target is torch.ops.aten.sym_size.int and node.args[1] == 0)


def _in_order(graph: fx.Graph, nodes: set[fx.Node]) -> list[fx.Node]:
    return [node for node in graph.nodes if node in nodes]
