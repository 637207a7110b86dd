"""Reading inductor's graphs node by node, and putting calls of our ops into them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

ATEN = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
VIEWS = (ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default, ATEN.unsqueeze.default)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTS = (torch.int32, torch.int64)


def name_of(node: fx.Node) -> str:
    """What ``node`` calls, without aten's and prims' namespaces."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace in ("aten", "prims") else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that ``node`` is."""
    value: Tensor = node.meta["val"]
    return value


def arguments_of(node: Any, op: torch._ops.OpOverload) -> dict[str, Any] | None:
    """The arguments of a call of ``op`` by name, defaults included; None of anything else."""
    if not isinstance(node, fx.Node) or node.target is not op:
        return None
    parameters = op._schema.arguments
    given = dict(zip((p.name for p in parameters), node.args, strict=False)) | node.kwargs
    return {p.name: p.default_value for p in parameters} | given


def operands(node: Any, target: Any) -> tuple[Any, Any]:
    """The first two arguments of a call of ``target``; None, None of anything else."""
    if not isinstance(node, fx.Node) or node.target is not target or node.kwargs or not node.args:
        return None, None
    return node.args[0], node.args[1] if len(node.args) > 1 else None


def reduces(node: Any, target: Any, source: fx.Node | None, keepdim: bool = True) -> bool:
    """Whether ``node`` reduces the last dimension of ``source`` by ``target``, in its dtype."""
    if not isinstance(node, fx.Node) or node.target is not target or len(node.args) < 2:
        return False
    if source is None or node.args[0] is not source or set(node.kwargs) - {"dtype"}:
        return False
    value = value_of(source)
    # Autocast names the dtype of sums.
    if node.kwargs.get("dtype") not in (None, value.dtype):
        return False
    return node.args[1] in ([-1], [value.dim() - 1]) and (node.args[2:] or (False,)) == (keepdim,)


def before_cast(node: fx.Node) -> fx.Node:
    """What ``node`` was before a cast from one floating-point or one integer dtype to another, if it is such."""
    if node.target is not CAST:
        return node
    source = node.args[0]
    assert isinstance(source, fx.Node), "a cast is of a tensor"
    dtypes = {value_of(source).dtype, value_of(node).dtype}
    return source if dtypes <= {*_FLOATS} or dtypes <= {*_INTS} else node


def before_float32(node: fx.Node) -> fx.Node:
    """What an op may read instead of ``node``, if it casts its argument to float32."""
    return before_cast(node) if value_of(node).dtype is torch.float32 else node


def before_view(node: Any) -> fx.Node | None:
    """What ``node`` shows in other dimensions, each row (the first dimension) by itself; None if it is no such view."""
    if not isinstance(node, fx.Node) or node.target not in VIEWS:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node), "a view is of a tensor"
    return source if same_rows(source, node) else None


def same_rows(*nodes: fx.Node) -> bool:
    """Whether the first dimensions are equal, and all tensors have one."""
    first, *others = map(value_of, nodes)
    return all(
        first.dim() > 0 and other.dim() > 0 and statically_known_true(first.size(0) == other.size(0))
        for other in others
    )


def number_of(node: Any) -> float | None:
    """The number that all elements are, if ``node`` is such a constant."""
    if isinstance(node, fx.Node) and node.target is ATEN.full.default:
        number: Any = node.args[1]
    elif isinstance(node, fx.Node) and node.target is ATEN.scalar_tensor.default:
        number = node.args[0]
    else:
        return None
    return float(number) if isinstance(number, (int, float)) else None


def item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node | None:
    """The node of one result, if there is one; several become one."""
    items = [user for user in node.users if operands(user, operator.getitem)[1] == index]
    if len(items) > 1:
        node.append(items[0])  # before all readers of the others
    for other in items[1:]:
        other.replace_all_uses_with(items[0])
        graph.erase_node(other)
    return items[0] if items else None


def call(graph: fx.Graph, op: Any, args: Any, kwargs: Any, origin: fx.Node) -> fx.Node:
    """A call of ``op``, with the shapes that its fake says."""
    node = graph.call_function(op, tuple(args), dict(kwargs))
    if "stack_trace" in origin.meta:
        node.meta["stack_trace"] = origin.meta["stack_trace"]
    arguments: Any = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    values, options = arguments
    with values[0].fake_mode:
        node.meta["val"] = op(*values, **options)
    return node


def new_item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    result = graph.call_function(operator.getitem, (node, index))
    result.meta["val"] = node.meta["val"][index]
    return result


def as_dtype(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    value: Any = value_of(node)
    if value.dtype is dtype:
        return node
    cast = graph.call_function(CAST, (node, dtype))
    with value.fake_mode:
        cast.meta["val"] = value.to(dtype)
    return cast


def erase_unused(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    for node in reversed(graph.nodes):
        if node in nodes and not node.users and node.op == "call_function":
            graph.erase_node(node)
