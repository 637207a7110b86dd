"""Whether a lowering has anything in reach that inductor could fuse it with."""

from __future__ import annotations

import operator

import torch

from compile_moe.lowering.inductor_compat import is_lowered, node_being_lowered


def stands_alone() -> bool:
    """Whether the node that is being lowered has nothing to fuse with: stored inputs, and as readers the graph's
    caller, ops of ours that are calls, or one collective. Views of them, and single results, count as they do.
    """
    node = node_being_lowered()
    return node is not None and all(map(_is_stored, node.all_input_nodes)) and _is_read_from_memory(node)


def is_only_reader() -> bool:
    """Whether nothing in reach reads the first argument of the node that is being lowered, but calls and the caller."""
    node = node_being_lowered()
    source = node and node.all_input_nodes[0]
    while source is not None and _selects(source):
        source = source.all_input_nodes[0]
    return source is not None and _is_read_from_memory(source, node)


def _is_stored(node: torch.fx.Node) -> bool:
    if _selects(node):
        return _is_stored(node.all_input_nodes[0])
    waited = _namespace(node) == "_c10d_functional" and "wait_tensor" in str(node.target)
    return node.op in ("placeholder", "get_attr") or waited or _is_call(node)


def _is_read_from_memory(node: torch.fx.Node, but_by: torch.fx.Node | None = None) -> bool:
    # Beside another reader inductor copies what a collective may overwrite.
    collective = len(node.users) == 1
    return all(
        user.op == "output"
        or user is but_by
        or _is_call(user)
        or (_selects(user) and _is_read_from_memory(user, but_by))
        or (collective and _namespace(user) == "_c10d_functional")
        for user in node.users
    )


def _is_call(node: torch.fx.Node) -> bool:
    return _namespace(node) == "compile_moe" and not is_lowered(node.target)


def _selects(node: torch.fx.Node) -> bool:
    """A view, or one result of several."""
    return node.target is operator.getitem or getattr(node.target, "is_view", False)


def _namespace(node: torch.fx.Node) -> str:
    return getattr(node.target, "namespace", "")
