"""From a traced graph over gate/up columns to an epilogue program.

The graph must be slices of its input that are its gate and up columns, and pointwise operations over them. Casts
between floating-point types vanish: the program computes in float32 throughout. Anything else is refused with the
node that stopped it.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

import torch
from torch import fx

from compile_moe.ops.aten_vocabulary import (
    ADD,
    BINARY,
    CASTS,
    CLAMP,
    CONSTANTS,
    FLOATS,
    LOGICAL,
    RSUB,
    SAME_VALUE,
    SLICES,
    SUB,
    UNARY,
    WHERE,
    described,
)
from compile_moe.ops.epilogue import Layout, Operand, Program, Step

aten = torch.ops.aten

#: Rows of the traced input: a prime, so that no reshape of it is mistaken for one of its columns.
ROWS = 7


class NotPointwise(Exception):
    """The traced graph has no form as an epilogue; the message says why."""


# Columns of the traced input that a value holds: (first, last + 1, step).
Columns = tuple[int, int, int]


class GraphToEpilogue:
    """Walks a graph over gate/up columns (rows, num_columns) once, turning nodes into columns of the input or
    program steps. ``rows`` may be symbolic.
    """

    def __init__(self, num_columns: int, rows: Any = ROWS) -> None:
        self.num_columns = num_columns
        self.rows = rows
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
                if val is not None and not self._is_row_of_width(val.shape):
                    raise NotPointwise(
                        f"it returns {tuple(val.shape)} for rows of gate and up of {self.width}"
                    )
                assert self.layout is not None
                return Program(self.layout, tuple(self.steps), value)
            else:
                raise NotPointwise(f"{node.op} {node.target} is a captured tensor")
        raise AssertionError("a traced graph ends with an output")

    def _is_row_of_width(self, shape: Any) -> bool:
        # Nothing here changes a symbolic number of rows.
        rows_fit = len(shape) == 2 and (not isinstance(self.rows, int) or shape[0] == self.rows)
        return rows_fit and shape[1] == self.width

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        if target in SLICES:
            self._slice(node, target)
        elif target is operator.getitem:
            self.columns[node] = self.chunks[node.args[0]][node.args[1]]  # type: ignore[index]
        elif target in SAME_VALUE:
            self._forward(node)
        elif target in CASTS:
            dtype = node.kwargs.get("dtype", node.args[1] if len(node.args) > 1 else None)
            if dtype not in FLOATS:
                raise NotPointwise(f"{described(node)} casts to {dtype}")
            self._forward(node)
        elif target in CONSTANTS:
            fill: Any = CONSTANTS[target]
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
        if isinstance(self.values.get(source), float) and target is aten.slice.Tensor:
            self.values[node] = self.values[source]
            return
        if source not in self.columns:
            raise NotPointwise(f"{described(node)} slices a computed value")
        first, last, step = self.columns[source]
        width = (last - first + step - 1) // step
        if target is aten.slice.Tensor:
            arguments = dict(zip(("dim", "start", "end", "step"), node.args[1:], strict=False)) | node.kwargs
            dim: Any = arguments.get("dim", 0)
            start: Any = arguments.get("start")
            end: Any = arguments.get("end")
            stride: Any = arguments.get("step", 1)
            if dim % 2 == 0:
                if not self._is_all_rows(start, end, stride):
                    raise NotPointwise(f"{described(node)} selects rows")
                self.columns[node] = (first, last, step)
                return
            begin, stop, _ = slice(start, end).indices(width)
            self.columns[node] = (first + begin * step, min(first + stop * step, last), step * stride)
            return
        arguments = dict(zip(("sizes", "dim"), node.args[1:], strict=False)) | node.kwargs
        dim = arguments.get("dim", 0)
        if dim % 2 != 1:
            raise NotPointwise(f"{described(node)} splits rows")
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

    def _is_all_rows(self, start: Any, end: Any, stride: Any) -> bool:
        if not isinstance(self.rows, int):
            return start in (None, 0) and end in (None, sys.maxsize) and stride == 1
        return (*slice(start, end).indices(self.rows)[:2], stride) == (0, self.rows, 1)

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
                f"{described(node)} uses columns {first}:{last}:{step} of {n}, neither halves nor even and odd ones"
            )
        layout, name = layouts[columns]
        if self.layout not in (None, layout):
            raise NotPointwise(f"{described(node)} mixes {self.layout} and {layout} columns")
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
        raise NotPointwise(f"{described(node)} uses {argument!r}")

    def _emit(self, op: str, *operands: Operand) -> str:
        step = Step(op, operands)
        if step not in self.steps:
            self.steps.append(step)
        return f"t{self.steps.index(step)}"

    def _pointwise(self, node: fx.Node, target: Any) -> None:
        args = node.args
        if any(isinstance(a, complex) for a in args):
            raise NotPointwise(f"{described(node)} is complex")
        if target in UNARY:
            value: Operand = self._emit(UNARY[target], self._operand(args[0], node))
        elif target in BINARY and not node.kwargs:
            op = BINARY[target]
            operands = [self._operand(a, node) for a in args[:2]]
            if op in LOGICAL and not all(_is_bool(a) for a in args[:2]):
                raise NotPointwise(f"{described(node)} combines values that are not comparisons")
            value = self._emit(op, *operands)
        elif target in (*ADD, *SUB, *RSUB):
            value = self._add(node, target)
        elif target is aten.relu.default:
            value = self._emit("maximum", self._operand(args[0], node), 0.0)
        elif target in CLAMP:
            value = self._clamp(node)
        elif target in WHERE:
            if not _is_bool(args[0]):
                raise NotPointwise(f"{described(node)} selects by a value that is no comparison")
            value = self._emit("where", *(self._operand(a, node) for a in args[:3]))
        elif target is aten.sign.default:
            source = self._operand(args[0], node)
            negative = self._emit("where", self._emit("lt", source, 0.0), -1.0, 0.0)
            value = self._emit("where", self._emit("gt", source, 0.0), 1.0, negative)
        elif target is aten.pow.Tensor_Scalar:
            value = self._power(self._operand(args[0], node), args[1], node)
        else:
            raise NotPointwise(f"{described(node)} is not a pointwise operation an epilogue can hold")
        self.values[node] = value

    def _add(self, node: fx.Node, target: Any) -> Operand:
        left, right = (self._operand(a, node) for a in node.args[:2])
        alpha: Any = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if target in RSUB:
            scaled = left if alpha == 1 else self._emit("mul", left, float(alpha))
            return self._emit("sub", right, scaled)
        if alpha != 1:
            right = self._emit("mul", right, float(alpha))
        return self._emit("add" if target in ADD else "sub", left, right)

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
            raise NotPointwise(f"{described(node)} raises to a power that is no integer of 1 to 8, nor 0.5")
        value = base
        for _ in range(math.trunc(abs(exponent)) - 1):
            value = self._emit("mul", value, base)
        return self._emit("reciprocal", value) if exponent < 0 else value


def _is_bool(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.meta["val"].dtype is torch.bool
