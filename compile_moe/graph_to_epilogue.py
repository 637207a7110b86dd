"""From a traced graph over gate/up columns to an epilogue program.

The graph must be slices of its input that are its gate and up columns, and pointwise operations over them. Casts
between floating-point types vanish: the program computes in float32 throughout. Anything else is refused with the
node that stopped it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from compile_moe.ops.epilogue import Layout, Operand, Program, Step

aten = torch.ops.aten

#: Rows of the traced input: a prime, so that no reshape of it is mistaken for one of its columns.
ROWS = 7


class NotPointwise(Exception):
    """The traced graph has no form as an epilogue; the message says why."""


_UNARY: dict[Any, str] = {
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
_BINARY: dict[Any, str] = {
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
_ADD = (aten.add.Tensor, aten.add.Scalar)
_SUB = (aten.sub.Tensor, aten.sub.Scalar)
_RSUB = (aten.rsub.Tensor, aten.rsub.Scalar)
_SAME_VALUE = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CONSTANTS: dict[Any, Callable[[Any], float]] = {
    aten.zeros_like.default: lambda args: 0.0,
    aten.new_zeros.default: lambda args: 0.0,
    aten.ones_like.default: lambda args: 1.0,
    aten.new_ones.default: lambda args: 1.0,
    aten.scalar_tensor.default: lambda args: args[0],
    aten.full.default: lambda args: args[1],
    aten.full_like.default: lambda args: args[1],
    aten.new_full.default: lambda args: args[2],
}
_LOGICAL = ("logical_and", "logical_or", "logical_not")

# Columns of the traced input that a value holds: (first, last + 1, step).
Columns = tuple[int, int, int]


class GraphToEpilogue:
    """Walks a traced graph once, turning nodes into columns of the input or program steps."""

    def __init__(self, num_columns: int) -> None:
        self.num_columns = num_columns
        self.columns: dict[fx.Node, Columns] = {}
        self.values: dict[fx.Node, Operand] = {}
        self.chunks: dict[fx.Node, list[Columns]] = {}
        self.layout: Layout | None = None
        self.width = num_columns
        self.steps: list[Step] = []

    def program(self, graph: fx.Graph) -> Program:
        for node in graph.nodes:
            if node.op == "placeholder":
                self.columns[node] = (0, self.num_columns, 1)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                result = node.args[0]
                if not isinstance(result, fx.Node):
                    raise NotPointwise(f"it must return one tensor, got {result!r}")
                value = self._operand(result, node)
                if not isinstance(value, str):
                    raise NotPointwise("it returns a constant")
                val = result.meta.get("val")
                if val is not None and not val.is_floating_point():
                    raise NotPointwise(f"it returns {val.dtype}, not floating point")
                if val is not None and tuple(val.shape) != (ROWS, self.width):
                    raise NotPointwise(
                        f"it returns {tuple(val.shape)} for rows of gate and up of {self.width}"
                    )
                assert self.layout is not None
                return Program(self.layout, tuple(self.steps), value)
            else:
                raise NotPointwise(f"{node.op} {node.target} is a captured tensor")
        raise AssertionError("a traced graph ends with an output")

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        if target in (
            aten.slice.Tensor,
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.chunk.default,
        ):
            self._slice(node, target)
        elif getattr(target, "__name__", "") == "getitem":
            self.columns[node] = self.chunks[node.args[0]][node.args[1]]  # type: ignore[index]
        elif target in _SAME_VALUE:
            self._forward(node)
        elif target in _CASTS:
            dtype = node.kwargs.get("dtype", node.args[1] if len(node.args) > 1 else None)
            if dtype not in _FLOATS:
                raise NotPointwise(f"{node.format_node()} casts to {dtype}")
            self._forward(node)
        elif target in _CONSTANTS:
            fill: Any = _CONSTANTS[target]
            self.values[node] = float(fill(node.args))
        else:
            self._pointwise(node, target)

    def _forward(self, node: fx.Node) -> None:
        source = node.args[0]
        if source in self.columns:
            self.columns[node] = self.columns[source]  # type: ignore[index]
        else:
            self.values[node] = self._operand(source, node)

    def _slice(self, node: fx.Node, target: Any) -> None:
        source: Any = node.args[0]
        if source not in self.columns:
            raise NotPointwise(f"{node.format_node()} slices a computed value")
        first, last, step = self.columns[source]
        width = (last - first + step - 1) // step
        if target is aten.slice.Tensor:
            arguments = dict(zip(("dim", "start", "end", "step"), node.args[1:], strict=False)) | node.kwargs
            dim: Any = arguments.get("dim", 0)
            start: Any = arguments.get("start")
            end: Any = arguments.get("end")
            stride: Any = arguments.get("step", 1)
            begin, stop, _ = slice(start, end).indices(width if dim % 2 == 1 else ROWS)
            if dim % 2 == 0:
                if (begin, stop, stride) != (0, ROWS, 1):
                    raise NotPointwise(f"{node.format_node()} selects rows")
                self.columns[node] = (first, last, step)
                return
            self.columns[node] = (first + begin * step, min(first + stop * step, last), step * stride)
            return
        arguments = dict(zip(("sizes", "dim"), node.args[1:], strict=False)) | node.kwargs
        dim = arguments.get("dim", 0)
        if dim % 2 != 1:
            raise NotPointwise(f"{node.format_node()} splits rows")
        sizes: Any = arguments["sizes"] if "sizes" in arguments else arguments["split_size"]
        if target is aten.chunk.default:
            sizes = -(-width // sizes)
        if isinstance(sizes, int):
            sizes = [min(sizes, width - at) for at in range(0, width, sizes)]
        pieces, at = [], first
        for size in sizes:
            pieces.append((at, min(at + size * step, last), step))
            at += size * step
        self.chunks[node] = pieces

    def _input(self, columns: Columns, node: fx.Node) -> str:
        """gate or up, fixing the layout at the first use."""
        n, half = self.num_columns, self.num_columns // 2
        first, last, step = columns
        layouts: dict[tuple[int, int, int], tuple[Layout, str]] = {(0, n, 1): ("ungated", "gate")}
        if n % 2 == 0:
            layouts |= {
                (0, half, 1): ("concatenated", "gate"),
                (half, n, 1): ("concatenated", "up"),
                (0, n, 2): ("interleaved", "gate"),
                (1, n, 2): ("interleaved", "up"),
            }
        if columns not in layouts:
            raise NotPointwise(
                f"{node.format_node()} uses columns {first}:{last}:{step} of {n}, neither halves nor even and odd ones"
            )
        layout, name = layouts[columns]
        if self.layout not in (None, layout):
            raise NotPointwise(f"{node.format_node()} mixes {self.layout} and {layout} columns")
        self.layout = layout
        self.width = n if layout == "ungated" else half
        return name

    def _operand(self, argument: Any, node: fx.Node) -> Operand:
        if isinstance(argument, bool | int | float):
            return float(argument)
        if isinstance(argument, fx.Node):
            if argument in self.columns:
                return self._input(self.columns[argument], node)
            if argument in self.values:
                return self.values[argument]
        raise NotPointwise(f"{node.format_node()} uses {argument!r}")

    def _emit(self, op: str, *operands: Operand) -> str:
        step = Step(op, operands)
        if step not in self.steps:
            self.steps.append(step)
        return f"t{self.steps.index(step)}"

    def _pointwise(self, node: fx.Node, target: Any) -> None:
        args = node.args
        if any(isinstance(a, complex) for a in args):
            raise NotPointwise(f"{node.format_node()} is complex")
        if target in _UNARY:
            value: Operand = self._emit(_UNARY[target], self._operand(args[0], node))
        elif target in _BINARY and not node.kwargs:
            op = _BINARY[target]
            operands = [self._operand(a, node) for a in args[:2]]
            if op in _LOGICAL and not all(_is_bool(a) for a in args[:2]):
                raise NotPointwise(f"{node.format_node()} combines values that are not comparisons")
            value = self._emit(op, *operands)
        elif target in (*_ADD, *_SUB, *_RSUB):
            value = self._add(node, target)
        elif target in (aten.relu.default,):
            value = self._emit("maximum", self._operand(args[0], node), 0.0)
        elif target in (aten.clamp.default, aten.clamp.Tensor):
            value = self._clamp(node)
        elif target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
            if not _is_bool(args[0]):
                raise NotPointwise(f"{node.format_node()} selects by a value that is no comparison")
            value = self._emit("where", *(self._operand(a, node) for a in args[:3]))
        elif target is aten.sign.default:
            source = self._operand(args[0], node)
            negative = self._emit("where", self._emit("lt", source, 0.0), -1.0, 0.0)
            value = self._emit("where", self._emit("gt", source, 0.0), 1.0, negative)
        elif target is aten.pow.Tensor_Scalar:
            value = self._power(self._operand(args[0], node), args[1], node)
        else:
            raise NotPointwise(f"{node.format_node()} is not a pointwise operation an epilogue can hold")
        self.values[node] = value

    def _add(self, node: fx.Node, target: Any) -> Operand:
        left, right = (self._operand(a, node) for a in node.args[:2])
        alpha: Any = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if target in _RSUB:
            scaled = left if alpha == 1 else self._emit("mul", left, float(alpha))
            return self._emit("sub", right, scaled)
        if alpha != 1:
            right = self._emit("mul", right, float(alpha))
        return self._emit("add" if target in _ADD else "sub", left, right)

    def _clamp(self, node: fx.Node) -> Operand:
        bounds = dict(zip(("min", "max"), node.args[1:], strict=False)) | node.kwargs
        value = self._operand(node.args[0], node)
        if bounds.get("min") is not None:
            value = self._emit("maximum", value, self._operand(bounds["min"], node))
        if bounds.get("max") is not None:
            value = self._emit("minimum", value, self._operand(bounds["max"], node))
        return value

    def _power(self, base: Operand, exponent: Any, node: fx.Node) -> Operand:
        if exponent == 0.5:
            return self._emit("sqrt", base)
        if not float(exponent).is_integer() or not 1 <= abs(exponent) <= 8:
            raise NotPointwise(
                f"{node.format_node()} raises to a power that is no integer of 1 to 8, nor 0.5"
            )
        value = base
        for _ in range(math.trunc(abs(exponent)) - 1):
            value = self._emit("mul", value, base)
        return self._emit("reciprocal", value) if exponent < 0 else value


def _is_bool(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.meta["val"].dtype is torch.bool
