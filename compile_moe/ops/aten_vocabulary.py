"""The operations of aten that an epilogue can hold, and what they are called there."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

UNARY: dict[Any, str] = {
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.exp.default: "exp",
    aten.exp2.default: "exp2",
    aten.expm1.default: "expm1",
    aten.log.default: "log",
    aten.log1p.default: "log1p",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.erf.default: "erf",
    aten.sin.default: "sin",
    aten.cos.default: "cos",
    aten.logical_not.default: "logical_not",
}
BINARY: dict[Any, str] = {
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    **{
        getattr(getattr(aten, c), o): c
        for c in ("lt", "le", "gt", "ge", "eq", "ne")
        for o in ("Tensor", "Scalar")
    },
    aten.logical_and.default: "logical_and",
    aten.logical_or.default: "logical_or",
    aten.bitwise_and.Tensor: "logical_and",
    aten.bitwise_or.Tensor: "logical_or",
    aten.clamp_min.default: "maximum",
    aten.clamp_max.default: "minimum",
    aten.clamp_min.Tensor: "maximum",
    aten.clamp_max.Tensor: "minimum",
}
CLAMP = (aten.clamp.default, aten.clamp.Tensor)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
ADD = (aten.add.Tensor, aten.add.Scalar)
SUB = (aten.sub.Tensor, aten.sub.Scalar)
RSUB = (aten.rsub.Tensor, aten.rsub.Scalar)
SAME_VALUE = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CONSTANTS: dict[Any, Callable[[Any], float]] = {
    aten.zeros_like.default: lambda args: 0.0,
    aten.new_zeros.default: lambda args: 0.0,
    aten.ones_like.default: lambda args: 1.0,
    aten.new_ones.default: lambda args: 1.0,
    aten.scalar_tensor.default: lambda args: args[0],
    aten.full.default: lambda args: args[1],
    aten.full_like.default: lambda args: args[1],
    aten.new_full.default: lambda args: args[2],
}
SLICES = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
OTHERS = (operator.getitem, aten.relu.default, aten.sign.default, aten.pow.Tensor_Scalar)
TRANSLATABLE = frozenset(
    (
        *UNARY,
        *BINARY,
        *CLAMP,
        *WHERE,
        *ADD,
        *SUB,
        *RSUB,
        *SAME_VALUE,
        *CASTS,
        *CONSTANTS,
        *SLICES,
        *OTHERS,
    )
)
LOGICAL = ("logical_and", "logical_or", "logical_not")


def is_translatable(node: fx.Node) -> bool:
    """Whether ``node`` is of a kind that an epilogue may hold; its arguments may yet say no."""
    return node.op == "call_function" and node.target in TRANSLATABLE


def is_slice(node: fx.Node) -> bool:
    """Whether ``node`` is some columns or rows of another tensor."""
    return node.target is operator.getitem or node.target in SLICES


def is_constant(node: fx.Node) -> bool:
    """Whether ``node`` is a scalar or a tensor of one value that no tensor goes into."""
    return is_translatable(node) and node.target in CONSTANTS and not tensor_inputs(node)


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
