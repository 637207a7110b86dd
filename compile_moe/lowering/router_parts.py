"""Parts of routers in inductor's graph: scores of all experts, and what is done with those of the chosen ones.

A softmax is there as amax, sub, exp, sum and div, around casts to float32; these are followed node by node.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx

from compile_moe.lowering.graph_edits import ATEN, before_cast, before_float32, operands, reduces, value_of


class NotARouter(Exception):
    """Why a topk can't become ``route_tokens``."""


class Scores(NamedTuple):
    """What a softmax over the last dimension, or a sigmoid, makes of ``argument``.

    nodes: what it consists of, in order, the result last; after it, its casts.
    """

    scoring: str
    argument: fx.Node
    nodes: tuple[fx.Node, ...]
    casts: tuple[fx.Node, ...] = ()

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The scores, in each dtype that they are in."""
        return (self.nodes[-1], *self.casts)

    @property
    def source(self) -> fx.Node:
        """What they are of, for an op that casts it to float32."""
        return before_float32(self.argument)


class Weights(NamedTuple):
    """Chosen scores, divided by their sum + epsilon (None: not divided), times factor.

    nodes: what it consists of after the chosen scores, in order.
    """

    result: fx.Node
    epsilon: float | None
    factor: float
    nodes: tuple[fx.Node, ...]


def topk_of(topk: fx.Node) -> tuple[fx.Node, int]:
    """From what topk takes the largest of the last dimension, and how many."""
    names = ("self", "k", "dim", "largest", "sorted")
    arguments: dict[str, Any] = dict(zip(names, topk.args, strict=False)) | topk.kwargs
    source, number, dim = arguments["self"], arguments["k"], arguments.get("dim", -1)
    if dim not in (-1, value_of(source).dim() - 1):
        raise NotARouter(f"it goes along dimension {dim}, not along the experts")
    if not arguments.get("largest", True):
        raise NotARouter("it takes the smallest, largest=False")
    if not isinstance(number, int):
        raise NotARouter(f"the number of those chosen, {number}, is dynamic")
    return source, number


def scores_behind(node: Any) -> Scores | None:
    """The scores that ``node`` is, or is a cast of."""
    casts: list[fx.Node] = []
    while isinstance(node, fx.Node):
        scores = softmax_of(node) or _sigmoid_of(node)
        if scores is not None:
            return scores._replace(casts=tuple(reversed(casts)))
        casts.append(node)
        node = before_cast(node) if before_cast(node) is not node else None
    return None


def softmax_of(result: fx.Node) -> Scores | None:
    """The softmax in float32 that ends in ``result``, if one does."""
    value = result.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.float32 or value.dim() < 2:
        return None
    if result.target is ATEN._softmax.default:
        argument: Any = result.args[0]
        return Scores("softmax", argument, (result,)) if result.args[1] in (-1, value.dim() - 1) else None
    exp, total = operands(result, ATEN.div.Tensor)
    shifted, _ = operands(exp, ATEN.exp.default)
    argument, largest = operands(shifted, ATEN.sub.Tensor)
    if not reduces(total, ATEN.sum.dim_IntList, exp) or not reduces(largest, ATEN.amax.default, argument):
        return None
    return Scores("softmax", argument, (largest, shifted, exp, total, result))


def _sigmoid_of(result: fx.Node) -> Scores | None:
    argument, _ = operands(result, ATEN.sigmoid.default)
    if argument is None or value_of(result).dim() < 2:
        return None
    if value_of(result).dtype is torch.float64:
        raise NotARouter("it chooses in float64, route_tokens in float32")
    return Scores("sigmoid", argument, (result,))


def weights_of(chosen: fx.Node) -> Weights:
    """The weights that are made of the chosen scores, and of which nothing else is read on the way."""
    weights = Weights(chosen, None, 1.0, ())
    if value_of(chosen).dtype is not torch.float32:
        # Less precise ones are rounded on the way; after a cast that costs nothing more.
        return weights
    weights = _divided(chosen) or weights
    if len(weights.result.users) == 1:
        (product,) = weights.result.users
        factors = operands(product, ATEN.mul.Tensor)
        factor = next((f for f in factors if isinstance(f, (int, float))), None)
        if factor is not None:
            return Weights(product, weights.epsilon, float(factor), (*weights.nodes, product))
    return weights


def _divided(chosen: fx.Node) -> Weights | None:
    for division in chosen.users:
        numerator, total = operands(division, ATEN.div.Tensor)
        if numerator is not chosen:
            continue
        nodes = [total, division]
        epsilon = 0.0
        sum_of, added = operands(total, ATEN.add.Tensor)
        if isinstance(added, (int, float)):
            epsilon, total = float(added), sum_of
            nodes.insert(0, total)
        inside = set(nodes)
        private = all(user in inside for node in (chosen, *nodes[:-1]) for user in node.users)
        if private and epsilon >= 0.0 and reduces(total, ATEN.sum.dim_IntList, chosen):
            return Weights(division, epsilon, 1.0, tuple(nodes))
    return None


def check_readers(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> None:
    for node in nodes:
        for user in node.users:
            if user not in inside:
                raise NotARouter(f"{node.name} is read by {user.name}, too")
