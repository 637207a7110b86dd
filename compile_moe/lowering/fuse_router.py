"""Passes that find routers which a model wrote itself, and merge a router with the token sort behind it.

Inductor's graph holds a softmax as amax, sub, exp, sum and div, around casts to float32; these are followed node by
node. Nothing is replaced whose softmax, or what is inside it, has another reader.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx

from compile_moe.ops.route_and_sort_tokens import route_and_sort_tokens
from compile_moe.ops.route_tokens import MAX_EXPERTS, route_tokens
from compile_moe.ops.sort_tokens import sort_tokens

#: Why a topk was left alone, newest last; for those who want to explain a graph.
refusals: list[str] = []
_MOST_REFUSALS = 100

_ATEN = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default


class _NotARouter(Exception):
    """Why a topk can't become ``route_tokens``."""


class _Softmax(NamedTuple):
    """A softmax over the last dimension of two, in float32."""

    argument: fx.Node
    inside: tuple[fx.Node, ...]
    result: fx.Node

    @property
    def source(self) -> fx.Node:
        """What it is taken of, in its own dtype."""
        return _before_cast(self.argument)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (*self.inside, self.result)


class _Router(NamedTuple):
    logits: fx.Node
    scoring: str
    renormalize: bool
    weights: fx.Node | None  # what becomes the op's weights; None where nobody reads them
    nodes: tuple[fx.Node, ...]  # what it consists of, but for topk and its results, in order


def fuse_router(graph: fx.Graph, device_type: str = "cuda") -> None:
    """Replace softmax → topk (→ division by the sum), and topk → softmax, by ``route_tokens``.

    The choice is one that topk may make of the same values; dtypes stay. Other devices than ``device_type`` are left
    alone: the op saves kernels on CUDA only.
    """
    for topk in graph.find_nodes(op="call_function", target=_ATEN.topk.default):
        chosen_from: Any = topk.args[0]
        if chosen_from.meta["val"].device.type != device_type:
            continue
        try:
            number = _check_topk(topk)
            values, ids = _item(graph, topk, 0), _item(graph, topk, 1)
            router = _softmax_then_topk(topk, values, number) or _topk_then_softmax(topk, values)
        except _NotARouter as refusal:
            refusals.append(f"{topk.name}: {refusal}")
            del refusals[:-_MOST_REFUSALS]
            continue
        arguments = (router.logits, number, router.scoring)
        with graph.inserting_before(topk):
            routing = _call(graph, route_tokens, arguments, {"renormalize": router.renormalize}, topk)
            if router.weights is not None:
                weights = _as_dtype(graph, _new_item(graph, routing, 0), router.weights.meta["val"].dtype)
                router.weights.replace_all_uses_with(weights)
            if ids is not None:
                ids.replace_all_uses_with(_new_item(graph, routing, 1))
        results = (item for item in (values, ids) if item is not None)
        _erase_unused(graph, {*router.nodes, *results, topk})


def fuse_router_and_sort(graph: fx.Graph) -> None:
    """Merge ``route_tokens`` with the ``sort_tokens`` of its ids into ``route_and_sort_tokens``."""
    for sort in graph.find_nodes(op="call_function", target=sort_tokens):
        arguments = (
            dict(zip(("topk_ids", "num_experts", "expert_map"), sort.args, strict=False)) | sort.kwargs
        )
        ids = _before_cast(arguments["topk_ids"])
        routing = ids.args[0] if ids.target is operator.getitem and ids.args[1] == 1 else None
        if not isinstance(routing, fx.Node) or routing.target is not route_tokens:
            continue
        logits: Any = routing.args[0] if routing.args else routing.kwargs["router_logits"]
        num_experts = logits.meta["val"].size(1)
        if arguments.get("expert_map") is not None or arguments["num_experts"] != num_experts:
            continue
        with graph.inserting_before(routing):
            merged = _call(graph, route_and_sort_tokens, routing.args, routing.kwargs, routing)
            items = [_new_item(graph, merged, index) for index in range(4)]
        for node, first in ((routing, 0), (sort, 2)):
            for item in list(node.users):
                index: Any = item.args[1]
                item.replace_all_uses_with(items[first + index])
                graph.erase_node(item)
            graph.erase_node(node)
        _erase_unused(graph, {arguments["topk_ids"], *items} & set(graph.nodes))


def _check_topk(topk: fx.Node) -> int:
    """How many experts a token chooses, if this is a choice of experts."""
    names = ("self", "k", "dim", "largest", "sorted")
    arguments: dict[str, Any] = dict(zip(names, topk.args, strict=False)) | topk.kwargs
    source, number = arguments["self"].meta["val"], arguments["k"]
    if source.dim() != 2:
        raise _NotARouter(f"its input has {source.dim()} dimensions, not (M, E)")
    if arguments.get("dim", -1) not in (-1, 1):
        raise _NotARouter(f"it goes along dimension {arguments['dim']}, not along the experts")
    if not arguments.get("largest", True):
        raise _NotARouter("it takes the smallest, largest=False")
    num_experts = source.size(1)
    if not isinstance(num_experts, int) or not isinstance(number, int):
        raise _NotARouter(f"the number of experts, {num_experts}, or of those chosen, {number}, is dynamic")
    if num_experts > MAX_EXPERTS:
        raise _NotARouter(f"{num_experts} experts are more than the {MAX_EXPERTS} that route_tokens takes")
    if number < 1:
        raise _NotARouter(f"it chooses {number} experts")
    return number


def _softmax_then_topk(topk: fx.Node, values: fx.Node | None, number: int) -> _Router | None:
    chosen_from = topk.args[0]
    assert isinstance(chosen_from, fx.Node), "topk's input is a tensor"
    # Rounding the probabilities before the choice makes ties only, of which ours chooses the larger one.
    softmax = _softmax_of(_before_cast(chosen_from))
    if softmax is None:
        return None
    nodes = tuple(dict.fromkeys((softmax.argument, *softmax.nodes, chosen_from)))
    _check_readers(nodes[1:], {*nodes, topk})
    division = _division_by_sum(values, number, softmax.source)
    weights = division[-1] if division else values
    return _Router(softmax.source, "softmax", bool(division), weights, (*nodes, *division))


def _topk_then_softmax(topk: fx.Node, values: fx.Node | None) -> _Router:
    softmax = _softmax_behind(values)
    if softmax is None or values is None:
        raise _NotARouter(f"{topk.args[0]} is no softmax over the experts in float32, and none follows")
    nodes = tuple(dict.fromkeys((values, softmax.argument, *softmax.nodes)))
    _check_readers(nodes[:-1], set(nodes))
    logits = topk.args[0]
    assert isinstance(logits, fx.Node), "topk's input is a tensor"
    if logits.meta["val"].dtype is torch.float64:
        raise _NotARouter("it chooses in float64, route_tokens in float32")
    if logits.meta["val"].dtype is torch.float32:
        # To fewer digits, the cast would be part of the choice.
        return _Router(_before_cast(logits), "topk_softmax", False, softmax.result, (logits, *nodes))
    return _Router(logits, "topk_softmax", False, softmax.result, nodes)


def _softmax_of(result: fx.Node) -> _Softmax | None:
    """The softmax that ends in ``result``, if one does."""
    value = result.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.float32 or value.dim() != 2:
        return None
    if result.target is _ATEN._softmax.default:
        argument, dim = result.args[:2]
        return _Softmax(argument, (), result) if dim in (-1, 1) else None  # type: ignore[arg-type]
    exp, total = _operands(result, _ATEN.div.Tensor)
    shifted, _ = _operands(exp, _ATEN.exp.default)
    argument, largest = _operands(shifted, _ATEN.sub.Tensor)
    if not _reduces(total, _ATEN.sum.dim_IntList, exp) or not _reduces(largest, _ATEN.amax.default, argument):
        return None
    return _Softmax(argument, (largest, shifted, exp, total), result)


def _softmax_behind(values: fx.Node | None) -> _Softmax | None:
    """The softmax of ``values``, among what is computed of them."""
    reached = [] if values is None else [values]
    # Cast, largest, sub, exp, sum, div: it is near, or there is none.
    for node in reached:
        softmax = _softmax_of(node)
        if softmax is not None and values in (softmax.argument, softmax.source):
            return softmax
        if len(reached) < 32:
            reached += [user for user in node.users if user not in reached]
    return None


def _division_by_sum(values: fx.Node | None, number: int, logits: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that divide the chosen probabilities by their sum, if nothing else reads these."""
    if values is None or values.meta["val"].dtype is not torch.float32:
        return ()
    for division in values.users:
        numerator, total = _operands(division, _ATEN.div.Tensor)
        if numerator is not values:
            continue
        nodes = [total, division]
        sum_of, epsilon = _operands(total, _ATEN.add.Tensor)
        if isinstance(epsilon, float):
            # The sum is at least topk / E: an epsilon below half of its last digit changes nothing.
            if not 0 <= epsilon <= number / logits.meta["val"].size(1) * 2**-26:
                return ()
            total = sum_of
            nodes.insert(0, total)
        inside = set(nodes)
        private = all(user in inside for node in (values, *nodes[:-1]) for user in node.users)
        if private and _reduces(total, _ATEN.sum.dim_IntList, values):
            return tuple(nodes)
    return ()


def _operands(node: Any, target: Any) -> tuple[Any, Any]:
    """The first two arguments of a call of ``target``; None, None of anything else."""
    if not isinstance(node, fx.Node) or node.target is not target or node.kwargs:
        return None, None
    return node.args[0], node.args[1] if len(node.args) > 1 else None


def _reduces(node: Any, target: Any, source: fx.Node | None) -> bool:
    """Whether ``node`` reduces ``source`` (M, E) to (M, 1) by ``target``."""
    if not isinstance(node, fx.Node) or node.target is not target or node.kwargs or source is None:
        return False
    return (
        len(node.args) == 3
        and node.args[0] is source
        and node.args[1] in ([-1], [1])
        and node.args[2] is True
    )


def _before_cast(node: fx.Node) -> fx.Node:
    """What ``node`` was before a cast from one floating-point or one integer dtype to another, if it is such."""
    if node.target is not _CAST:
        return node
    source = node.args[0]
    assert isinstance(source, fx.Node), "a cast is of a tensor"
    same_kind = source.meta["val"].is_floating_point() == node.meta["val"].is_floating_point()
    return source if same_kind and source.meta["val"].dtype is not torch.bool else node


def _check_readers(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> None:
    for node in nodes:
        for user in node.users:
            if user not in inside:
                raise _NotARouter(f"{node.name} is read by {user.name}, too")


def _item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node | None:
    """The node of one result, if there is one; several become one."""
    items = [user for user in node.users if user.target is operator.getitem and user.args[1] == index]
    for other in items[1:]:
        other.replace_all_uses_with(items[0])
        graph.erase_node(other)
    return items[0] if items else None


def _call(graph: fx.Graph, op: Any, args: Any, kwargs: Any, origin: fx.Node) -> fx.Node:
    """A call of ``op``, with the shapes that its fake says."""
    node = graph.call_function(op, tuple(args), dict(kwargs))
    if "stack_trace" in origin.meta:
        node.meta["stack_trace"] = origin.meta["stack_trace"]
    arguments: Any = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    values, options = arguments
    with values[0].fake_mode:
        node.meta["val"] = op(*values, **options)
    return node


def _new_item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item


def _as_dtype(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    value = node.meta["val"]
    if value.dtype is dtype:
        return node
    cast = graph.call_function(_CAST, (node, dtype))
    with value.fake_mode:
        cast.meta["val"] = value.to(dtype)
    return cast


def _erase_unused(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    for node in reversed(graph.nodes):
        if node in nodes and not node.users and node.op == "call_function":
            graph.erase_node(node)
