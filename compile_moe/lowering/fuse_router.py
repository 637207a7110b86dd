"""Passes that find routers which a model wrote itself, and merge a router with the token sort behind it.

Nothing is replaced whose scores, or what is inside it, have another reader.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from compile_moe.lowering.expert_groups import Groups, groups_behind
from compile_moe.lowering.flat_rows import as_rows, in_place_of
from compile_moe.lowering.graph_edits import (
    ATEN,
    arguments_of,
    as_dtype,
    before_cast,
    before_float32,
    call,
    erase_unused,
    item,
    new_item,
    operands,
    value_of,
)
from compile_moe.lowering.refusals import Refusals
from compile_moe.lowering.router_parts import (
    NotARouter,
    Scores,
    Weights,
    check_readers,
    scores_behind,
    softmax_of,
    topk_of,
    weights_of,
)
from compile_moe.ops.aten_vocabulary import described
from compile_moe.ops.route_and_sort_tokens import route_and_sort_tokens
from compile_moe.ops.route_tokens import MAX_EXPERTS, route_tokens
from compile_moe.ops.sort_tokens import sort_tokens

#: Why a topk or a sort was left alone, newest last; for those who want to explain a graph.
refusals = Refusals()
# Cast, largest, sub, exp, sum, div: what belongs to a router is near, or there is none.
_NEAR = 32


class _Choice(NamedTuple):
    """What topk chooses from: scores, + bias, limited to groups.

    private: what is between scores and topk, in order. shared: constants and casts of the bias.
    """

    scores: Scores
    bias: fx.Node | None
    groups: Groups | None
    private: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]


class _Router(NamedTuple):
    """logits (..., E), arguments, options: of ``route_tokens``.

    weights: what becomes its weights; None where nobody reads them.
    nodes: what it consists of, but for topk and its results, in order.
    """

    logits: fx.Node
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    weights: fx.Node | None
    nodes: tuple[fx.Node, ...]


def fuse_router(graph: fx.Graph, device_type: str = "cuda") -> None:
    """Replace routers by ``route_tokens``: softmax or sigmoid → (+ bias →) (groups →) topk → weights; topk → softmax.

    The choice is one that topk may make of the same values; dtypes stay. Other devices than ``device_type`` are left
    alone: the op saves kernels on CUDA only.
    """
    found: list[str] = []
    replaced: set[fx.Node] = set()
    # Groups are chosen by topk, too: they go with the choice of experts behind them.
    for topk in reversed(graph.find_nodes(op="call_function", target=ATEN.topk.default)):
        if topk in replaced:
            continue
        try:
            number = _number_of_experts(topk)
            values, ids = item(graph, topk, 0), item(graph, topk, 1)
            router = _scores_then_topk(topk, number, values, ids) or _topk_then_softmax(topk, number, values)
            nodes = {*router.nodes, topk, *(result for result in (values, ids) if result is not None)}
            replaced |= nodes
            device = value_of(router.logits).device.type
            if device != device_type:
                raise NotARouter(f"it is on {device}; route_tokens saves kernels on {device_type} only")
        except NotARouter as refusal:
            found.append(f"router at {described(topk)}: {refusal}")
            continue
        with graph.inserting_before(topk):
            logits = as_rows(graph, router.logits)
            routing = call(graph, route_tokens, (logits, *router.arguments), router.options, topk)
            if router.weights is not None:
                weights = as_dtype(graph, new_item(graph, routing, 0), value_of(router.weights).dtype)
                in_place_of(graph, weights, router.weights, router.logits)
            if ids is not None:
                in_place_of(graph, new_item(graph, routing, 1), ids, router.logits)
        erase_unused(graph, {*nodes, router.logits})
    for reason in reversed(found):
        refusals.refuse(reason)


def fuse_router_and_sort(graph: fx.Graph) -> None:
    """Merge ``route_tokens`` with the ``sort_tokens`` of its ids into ``route_and_sort_tokens``."""
    for sort in graph.find_nodes(op="call_function", target=sort_tokens):
        arguments = arguments_of(sort, sort_tokens)
        assert arguments is not None, "it is a call of sort_tokens"
        ids = before_cast(arguments["topk_ids"])
        routing = _routing_of(ids)
        refusal = _no_merge(ids, routing, arguments)
        if refusal:
            refusals.refuse(f"{sort.name} behind a router: {refusal}")
        if refusal or routing is None:
            continue
        with graph.inserting_before(routing):
            merged = call(graph, route_and_sort_tokens, routing.args, routing.kwargs, routing)
            items = [new_item(graph, merged, index) for index in range(4)]
        for node, first in ((routing, 0), (sort, 2)):
            for result in list(node.users):
                index: Any = result.args[1]
                result.replace_all_uses_with(items[first + index])
                graph.erase_node(result)
            graph.erase_node(node)
        erase_unused(graph, {arguments["topk_ids"], *items} & set(graph.nodes))


def _routing_of(ids: fx.Node) -> fx.Node | None:
    """The ``route_tokens`` whose ids these are."""
    routing = ids.args[0] if ids.target is operator.getitem and ids.args[1] == 1 else None
    return routing if isinstance(routing, fx.Node) and routing.target is route_tokens else None


def _no_merge(ids: fx.Node, routing: fx.Node | None, arguments: dict[str, Any]) -> str:
    """Why a sort of ``ids`` can't be merged with a router before it; "" if it can, or there is no router."""
    if routing is None:
        sources = [ids]
        for source in sources:
            if _routing_of(source) is not None:
                return f"its ids are not those chosen, but {described(ids)}"
            sources += [argument for argument in source.all_input_nodes if argument not in sources]
            if len(sources) > _NEAR:
                break
        return ""
    logits: Any = routing.args[0] if routing.args else routing.kwargs["router_logits"]
    num_experts = logits.meta["val"].size(1)
    if arguments["expert_map"] is not None:
        return "an expert_map sends ids to local experts, which the router doesn't know of"
    if arguments["num_experts"] != num_experts:
        return f"it sorts by {arguments['num_experts']} experts, the router chooses from {num_experts}"
    return ""


def _number_of_experts(topk: fx.Node) -> int:
    """How many experts a token chooses, if this is a choice of experts."""
    source, number = topk_of(topk)
    value = value_of(source)
    if value.dim() < 2:
        raise NotARouter(f"its input has {value.dim()} dimensions, not (M, E)")
    num_experts = value.size(-1)
    if not isinstance(num_experts, int):
        raise NotARouter(f"the number of experts, {num_experts}, is dynamic")
    if num_experts > MAX_EXPERTS:
        raise NotARouter(f"{num_experts} experts are more than the {MAX_EXPERTS} that route_tokens takes")
    if number < 1:
        raise NotARouter(f"it chooses {number} experts")
    return number


def _scores_then_topk(
    topk: fx.Node, number: int, values: fx.Node | None, ids: fx.Node | None
) -> _Router | None:
    choice = _choice_of(topk.args[0])
    if choice is None:
        return None
    scores, bias, groups, between, shared = choice
    chosen = _chosen_scores(choice, values, ids)
    weights = None if chosen is None else weights_of(chosen)
    private = tuple(dict.fromkeys((*scores.nodes, *scores.casts, *between)))
    behind = () if chosen is None or weights is None else (chosen, *weights.nodes)
    check_readers(private, {*private, topk, *behind})
    options = _options(weights)
    if bias is not None:
        options["correction_bias"] = bias
    if groups is not None and groups.topk_group < groups.num_expert_group:
        _check_groups(scores, groups, number)
        options |= {"num_expert_group": groups.num_expert_group, "topk_group": groups.topk_group}
        if groups.excluded_score is not None:
            options["excluded_score"] = groups.excluded_score
    return _Router(
        scores.source,
        (number, scores.scoring),
        options,
        None if weights is None else weights.result,
        (scores.argument, *shared, *private, *behind),
    )


def _choice_of(chosen_from: Any) -> _Choice | None:
    # Rounding before a choice makes ties only, of which ours chooses the larger one.
    limited = before_cast(chosen_from)
    groups = groups_behind(limited)
    biased = limited if groups is None else groups.scores
    private, shared = ((), ()) if groups is None else (groups.private, groups.shared)
    private = (*private, limited, chosen_from)
    scores = scores_behind(biased)
    if scores is not None:
        return _Choice(scores, None, groups, (biased, *private), shared)
    total = before_cast(biased)
    terms = operands(total, ATEN.add.Tensor)
    for term, other in (terms, terms[::-1]):
        # Scores of 16 bits lose digits before the bias is added, unless one kernel does both, as inductor's would.
        scores = scores_behind(term)
        if scores is not None:
            if value_of(total).dtype is torch.float64:
                raise NotARouter("it chooses in float64, route_tokens in float32")
            bias, *casts = _bias_of(other, scores)
            return _Choice(scores, bias, groups, (total, biased, *private), (*shared, *casts))
    return None


def _bias_of(added: Any, scores: Scores) -> list[fx.Node]:
    """The bias (E,), and what casts and unsqueezes it to ``added``."""
    num_experts = value_of(scores.argument).size(-1)
    nodes = [added] if isinstance(added, fx.Node) else []
    while nodes:
        node: Any = nodes[0]
        value = value_of(node)
        if before_float32(node) is not node:
            nodes.insert(0, before_float32(node))
        elif value.shape == (num_experts,) and value.is_floating_point():
            return nodes
        elif value.shape == (1, num_experts) and node.target is ATEN.unsqueeze.default:
            source: Any = node.args[0]
            nodes.insert(0, source)
        else:
            break
    raise NotARouter(f"{added} is added to the scores, and is no bias (E,)")


def _chosen_scores(choice: _Choice, values: fx.Node | None, ids: fx.Node | None) -> fx.Node | None:
    """The scores of the chosen experts, if anybody reads them."""
    gathers = []
    for user in () if ids is None else ids.users:
        source, dim = operands(user, ATEN.gather.default)
        if source in choice.scores.results and dim in (value_of(user).dim() - 1, -1) and user.args[2] is ids:
            gathers.append(user)
    if values is None:
        return gathers[0] if gathers else None
    if choice.bias is not None or (choice.groups is not None and choice.groups.excluded_score is not None):
        raise NotARouter(f"{values.name} is read, and is no score without the bias or outside of the groups")
    return values


def _check_groups(scores: Scores, groups: Groups, number: int) -> None:
    if scores.scoring != "sigmoid":
        raise NotARouter(f"it limits {scores.scoring} scores to groups, route_tokens only sigmoids")
    num_experts = value_of(scores.argument).size(-1)
    if number > groups.topk_group * (num_experts // groups.num_expert_group):
        raise NotARouter(f"it chooses {number} experts, more than there are in the chosen groups")


def _options(weights: Weights | None) -> dict[str, Any]:
    options: dict[str, Any] = {"renormalize": weights is not None and weights.epsilon is not None}
    if weights is not None and weights.epsilon is not None:
        options["epsilon"] = weights.epsilon
    if weights is not None and weights.factor != 1.0:
        options["routed_scaling_factor"] = weights.factor
    return options


def _topk_then_softmax(topk: fx.Node, number: int, values: fx.Node | None) -> _Router:
    softmax = _softmax_behind(values)
    if softmax is None or values is None:
        raise NotARouter(
            f"{topk.args[0]} is no softmax or sigmoid (+ bias) over the experts, and no softmax follows"
        )
    weights = softmax.nodes[-1]
    nodes = tuple(dict.fromkeys((values, softmax.argument, *softmax.nodes)))
    check_readers(nodes[:-1], set(nodes))
    logits: Any = topk.args[0]
    if value_of(logits).dtype is torch.float64:
        raise NotARouter("it chooses in float64, route_tokens in float32")
    # To fewer digits, a cast would be part of the choice.
    arguments = number, "topk_softmax"
    return _Router(before_float32(logits), arguments, {"renormalize": False}, weights, (logits, *nodes))


def _softmax_behind(values: fx.Node | None) -> Scores | None:
    """The softmax of ``values``, among what is computed of them."""
    reached = [] if values is None else [values]
    for node in reached:
        softmax = softmax_of(node)
        if softmax is not None and values in (softmax.argument, softmax.source):
            return softmax
        if len(reached) < _NEAR:
            reached += [user for user in node.users if user not in reached]
    return None
