"""Groups of experts as DeepSeek-V3 writes them, in inductor's graph.

The scores are viewed as (M, groups, experts of a group), their two best sum up to a group's score, a topk chooses
groups, a scatter makes them a mask, and where fills a number in outside of it.
"""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from compile_moe.lowering.graph_edits import (
    ATEN,
    CAST,
    before_view,
    number_of,
    operands,
    reduces,
    same_rows,
    value_of,
)
from compile_moe.lowering.router_parts import NotARouter, topk_of

_EXPAND, _WHERE, _IOTA = ATEN.expand.default, ATEN.where.self, torch.ops.prims.iota.default
_NOT = (ATEN.bitwise_not.default, ATEN.logical_not.default)


class Groups(NamedTuple):
    """The choice of some of the groups, as arguments of ``route_tokens``.

    scores: (M, E), of all experts.
    private: what nothing else may read. shared: constants, which other layers may read, too.
    """

    num_expert_group: int
    topk_group: int
    excluded_score: float | None
    scores: fx.Node
    private: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]


class _Mask(NamedTuple):
    """1 where the group (M, groups) is among ids (M, topk_group)."""

    ids: fx.Node
    private: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]


def groups_behind(node: fx.Node) -> Groups | None:
    """The groups that experts are limited to in ``node`` (M, E), if they are."""
    where = node if node.target is _WHERE else before_view(node)
    if where is None or where.target is not _WHERE:
        return None
    condition, first, second = where.args
    fills = number_of(first) is not None
    constant, kept = (first, second) if fills else (second, first)
    score = number_of(constant)
    if score is None or math.isnan(score) or not isinstance(condition, fx.Node):
        raise NotARouter(f"{where.name} limits the experts, but fills in no number")
    base, inverted, path = _uncovered(condition)
    mask = _mask_of(base)
    if mask is None or inverted is not fills:
        raise NotARouter(f"{where.name} limits the experts, but not to groups that a topk chose")
    topk, _ = operands(mask.ids, operator.getitem)
    group_scores, topk_group = topk_of(topk)
    scores, inner = _summed_pairs(group_scores)
    num_groups, num_experts = value_of(base).size(1), value_of(scores).size(1)
    members = num_groups, num_experts // num_groups
    _check_shapes([*path, base], members)
    if tuple(value_of(inner[0]).shape[1:]) != members:
        raise NotARouter(f"{where.name} limits the experts to other groups than it chose")
    shape = tuple(value_of(where).shape[1:])
    if kept is not scores and not (shape == members and before_view(kept) is scores):
        raise NotARouter(f"{where.name} limits the experts, but the groups are of other scores")
    masked = tuple(value_of(condition).shape[1:])
    if masked not in (shape, (num_groups, 1)) or not same_rows(scores, group_scores, condition, where):
        raise NotARouter(f"{where.name} limits the experts to groups of other shapes")
    views = (kept,) if isinstance(kept, fx.Node) and kept is not scores else ()
    assert isinstance(constant, fx.Node), "a number is in a node"
    private = (*inner, group_scores, topk, *mask.private, *reversed(path), *views, where, node)
    excluded_score = None if score == -math.inf else score
    return Groups(num_groups, topk_group, excluded_score, scores, private, (constant, *mask.shared))


def _uncovered(condition: fx.Node) -> tuple[fx.Node, bool, list[fx.Node]]:
    """What a mask is made of by casts, views and not; whether it is inverted; and the nodes between."""
    node, inverted, path = condition, False, []
    while node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        is_not = node.target in _NOT and value_of(source).dtype is torch.bool
        keeps = node.target in (CAST, ATEN.clone.default, _EXPAND) or before_view(node) is not None
        if not is_not and not keeps:
            break
        inverted ^= is_not
        path.append(node)
        node = source
    return node, inverted, path


def _check_shapes(path: list[fx.Node], members: tuple[int, int]) -> None:
    """That expanding repeats each group for its members, and nothing else."""
    for expanded, source in itertools.pairwise(path):
        shapes = tuple(value_of(source).shape[1:]), tuple(value_of(expanded).shape[1:])
        repeats = shapes == ((members[0], 1), members) and same_rows(source, expanded)
        if expanded.target is _EXPAND and not repeats:
            raise NotARouter(f"{expanded.name} spreads groups over experts that are not consecutive")


def _mask_of(node: fx.Node) -> _Mask | None:
    if value_of(node).dim() != 2:
        return None
    mask: _Mask | None = None
    if (
        node.target is ATEN.scatter.value
        and len(node.args) == 4
        and node.args[1] in (1, -1)
        and node.args[3] == 1
    ):
        zeros, _, ids, _ = node.args
        if number_of(zeros) == 0 and isinstance(ids, fx.Node) and isinstance(zeros, fx.Node):
            mask = _Mask(ids, (ids, node), (zeros,))
    elif node.target is _WHERE and number_of(node.args[1]) == 1 and number_of(node.args[2]) == 0:
        # What inductor makes of a scatter of one group a token.
        condition, one, zero = node.args
        for pair in (operands(condition, ATEN.eq.Tensor), operands(condition, ATEN.eq.Tensor)[::-1]):
            ids, *between = _unspread(pair[0])
            iota, *views = _unspread(pair[1])
            if _counts(iota, value_of(node).size(1)) and same_rows(node, ids) and value_of(ids).size(1) == 1:
                mask = _Mask(ids, (ids, *between, condition, node), (iota, *views, one, zero))  # type: ignore[arg-type]
    if mask is None or operands(mask.ids, operator.getitem)[1] != 1:
        return None
    return mask if mask.ids.args[0].target is ATEN.topk.default else None  # type: ignore[union-attr]


def _unspread(node: Any) -> list[fx.Node]:
    """``node`` and what it is a view or an expansion of, deepest first."""
    nodes = [node]
    while nodes[0] is not None and nodes[0].target in (_EXPAND, ATEN.view.default, ATEN.reshape.default):
        nodes.insert(0, nodes[0].args[0])
    return nodes


def _counts(node: fx.Node | None, number: int) -> bool:
    """Whether it is 0, 1, … number - 1."""
    return (
        node is not None
        and node.target is _IOTA
        and node.args == (number,)
        and (node.kwargs["start"], node.kwargs["step"]) == (0, 1)
    )


def _summed_pairs(group_scores: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The scores of which groups' two best sum up to ``group_scores``, and the nodes between."""
    refusal = NotARouter(f"{group_scores.name} is no sum of the two best scores of each group")
    best, _ = operands(group_scores, ATEN.sum.dim_IntList)
    topk, index = operands(best, operator.getitem)
    if not reduces(group_scores, ATEN.sum.dim_IntList, best, keepdim=False) or index != 0:
        raise refusal
    if topk.target is not ATEN.topk.default:
        raise refusal
    grouped, number = topk_of(topk)
    scores = before_view(grouped)
    if scores is None or value_of(scores).dim() != 2 or value_of(grouped).dim() != 3:
        raise refusal
    if number != min(2, value_of(grouped).size(2)) or value_of(grouped).dtype is not torch.float32:
        raise refusal
    return scores, (grouped, topk, best)
