"""Values of tokens in more than two dimensions, such as (batch, sequence, E), as rows (M, E), and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compile_moe.lowering.graph_edits import ATEN, VIEWS, value_of


def as_rows(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``node`` (..., E) as (M, E)."""
    value = value_of(node)
    if value.dim() == 2:
        return node
    source = node.args[0] if node.target in VIEWS else None
    if isinstance(source, fx.Node) and _is_rows(source, value.size(-1)):
        return source
    return _reshaped(graph, node, [-1, value.size(-1)])


def in_place_of(graph: fx.Graph, rows: fx.Node, node: fx.Node, like: fx.Node) -> None:
    """Let readers of ``node`` (..., topk) read ``rows`` (M, topk) instead; ``like`` (..., E) is there before."""
    value = value_of(node)
    if value.dim() > 2:
        # Those who made them rows, too, read them as they are: the sort of ids is next to their choice then.
        for user in tuple(node.users):
            if user.target in VIEWS and _is_rows(user, value.size(-1)):
                user.replace_all_uses_with(rows)
                graph.erase_node(user)
        if not node.users:
            return
        sizes = [
            size if isinstance(size, int) else _size(graph, like, dim) for dim, size in enumerate(value.shape)
        ]
        rows = _reshaped(graph, rows, sizes)
    node.replace_all_uses_with(rows)


def _is_rows(node: fx.Node, columns: Any) -> bool:
    """Whether a view of (..., columns) is of the same elements in rows."""
    value = value_of(node)
    return value.dim() == 2 and isinstance(columns, int) and value.size(1) == columns


def _size(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    size = graph.call_function(ATEN.sym_size.int, (node, dim))
    size.meta["val"] = value_of(node).size(dim)
    return size


def _reshaped(graph: fx.Graph, node: fx.Node, sizes: list[Any]) -> fx.Node:
    view = graph.call_function(ATEN.reshape.default, (node, sizes))
    value: Any = value_of(node)
    with value.fake_mode:
        view.meta["val"] = torch.reshape(value, fx.map_arg(sizes, lambda size: size.meta["val"]))
    return view
