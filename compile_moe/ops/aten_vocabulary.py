"""The operations that an epilogue can hold: of aten, and the layer's own activation."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from compile_moe.ops.act_and_mul import act_and_mul
from compile_moe.ops.aten_formulas import BITWISE, FORMULAS
from compile_moe.ops.column_codes import MOVES

aten = torch.ops.aten

SAME_VALUE = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CONSTANTS: dict[Any, Callable[[Any], bool | int | float]] = {
    aten.zeros_like.default: lambda args: 0.0,
    aten.new_zeros.default: lambda args: 0.0,
    aten.zeros.default: lambda args: 0.0,
    aten.ones_like.default: lambda args: 1.0,
    aten.new_ones.default: lambda args: 1.0,
    aten.ones.default: lambda args: 1.0,
    aten.scalar_tensor.default: lambda args: args[0],
    aten.full.default: lambda args: args[1],
    aten.full_like.default: lambda args: args[1],
    aten.new_full.default: lambda args: args[2],
    # Read before it is written, it could be anything.
    **dict.fromkeys(
        (
            aten.empty.memory_format,
            aten.empty_like.default,
            aten.new_empty.default,
            aten.empty_strided.default,
            aten.empty_permuted.default,
        ),
        lambda args: float("nan"),
    ),
}
#: Of a tensor, columns at several places, or a mask; the rest of what is translated by itself.
OTHERS = (operator.getitem, aten.copy.default, aten.glu.default, aten.index_put.default)
TRANSLATABLE = frozenset((*FORMULAS, *BITWISE, *MOVES, *SAME_VALUE, *CASTS, *CONSTANTS, *OTHERS, act_and_mul))


def is_translatable(node: fx.Node) -> bool:
    """Whether ``node`` is of a kind that an epilogue may hold; its arguments may yet say no."""
    return is_number(node) or (node.op == "call_function" and node.target in TRANSLATABLE)


def is_constant(node: fx.Node) -> bool:
    """Whether ``node`` is a scalar or a tensor of one value that no tensor goes into."""
    return is_number(node) or (
        node.op == "call_function" and node.target in CONSTANTS and not tensor_inputs(node)
    )


def is_number(node: fx.Node) -> bool:
    """Whether ``node`` is one number that the model's code wrote as a tensor, such as ``torch.tensor(1.7)``.

    These are copied before they are used; parameters and buffers, which may change, are not.
    """
    is_literal = all(user.target is aten.lift_fresh_copy.default for user in node.users)
    return node.op == "get_attr" and is_literal and number_of(node) is not None


def number_of(node: fx.Node) -> bool | int | float | None:
    """The number of a ``get_attr`` node, or None if it is none, or on a device that reading would wait for."""
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    # Of the very type: a subclass may have no data.
    if type(value) is not Tensor or value.numel() != 1 or value.device.type != "cpu":
        return None
    number: bool | int | float | complex = value.item()
    return None if isinstance(number, complex) else number


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of ``node`` that are tensors or tuples of them, not sizes."""
    return [
        source for source in node.all_input_nodes if isinstance(source.meta.get("val"), (Tensor, tuple, list))
    ]


def described(node: fx.Node) -> str:
    """What ``node`` computes, and which line of the model says so: "cumsum (`x.cumsum(-1)`, line 7 of model.py)"."""
    target: Any = node.target
    name = str(getattr(target, "overloadpacket", getattr(target, "__name__", target))).rpartition(".")[2]
    frames = re.findall(r'File "(?:.*/)?(.+)", line (\d+).*\n\s*(.+)', node.meta.get("stack_trace") or "")
    if not frames:
        return name
    file, line, code = frames[-1]
    return f"{name} (`{code}`, line {line} of {file})"
