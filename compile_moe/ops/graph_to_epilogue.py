"""From a graph over gate/up columns to an epilogue program.

The graph must move the columns of its input about and compute pointwise on them, so that each element of its result
depends on one gate and one up. Casts between floating-point types vanish: the program computes in float32
throughout. Anything else is refused with the node that stopped it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from compile_moe.ops.act_and_mul import act_and_mul
from compile_moe.ops.aten_formulas import BITWISE, FORMULAS, Formula, NotPointwise, glu, where
from compile_moe.ops.aten_vocabulary import (
    CASTS,
    CONSTANTS,
    FLOATS,
    SAME_VALUE,
    described,
    is_number,
    number_of,
    tensor_inputs,
)
from compile_moe.ops.column_codes import MOVES, Columns, Movement, halves, moved_tensors
from compile_moe.ops.epilogue import Layout, Program, parse
from compile_moe.ops.epilogue_builder import StepBuilder, Value

__all__ = ["ROWS", "NotPointwise", "program_of", "sources_of"]

aten = torch.ops.aten

#: Rows of a traced input: a prime, so that no reshape of it is mistaken for one of its columns.
ROWS = 7

#: float32 holds every integer up to here.
_MOST_EXACT_INTEGER = 2**24


def program_of(gate_up: fx.Node, end: Any) -> Program:
    """The program that computes the node ``end`` from ``gate_up`` (rows, num_columns), whose rows may be symbolic.

    Raises:
        NotPointwise: there is none.
    """
    if not isinstance(end, fx.Node):
        raise NotPointwise(f"it must return one tensor, got {end!r}")
    rows, num_columns = gate_up.meta["val"].shape
    shape = end.meta["val"].shape
    layouts: tuple[Layout, ...] = ("concatenated", "interleaved")
    if len(shape) == 2 and shape[1] == num_columns:
        layouts = ("ungated",)
    elif num_columns % 2:
        raise NotPointwise(f"it returns {tuple(shape)} for {num_columns} columns, which have no halves")
    nodes = sources_of(end, gate_up)
    order = [node for node in gate_up.graph.nodes if node in nodes and node is not end]
    refusals: list[_Refusal] = []
    # Numbers of columns are computed with, whatever the caller traces or fakes.
    with _disable_current_modes():
        for layout in layouts:
            try:
                return _Translation(layout, gate_up, rows, num_columns).program((*order, end))
            except _Refusal as refusal:
                refusals.append(refusal)
    # From the layout that came farthest.
    raise NotPointwise(str(max(refusals, key=lambda refusal: refusal.position)))


def sources_of(end: fx.Node, gate_up: fx.Node) -> set[fx.Node]:
    """What ``end`` is computed from, up to ``gate_up``."""
    found: set[fx.Node] = set()
    pending = [end]
    while pending:
        for source in (node := pending.pop()).all_input_nodes:
            is_tensor = source in tensor_inputs(node) or source.op == "get_attr"
            if is_tensor and source is not gate_up and source not in found:
                found.add(source)
                pending.append(source)
    return found


class _Refusal(NotPointwise):
    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class _Translation:
    """Walks a graph over gate and up in one layout, turning nodes into codes of columns, and program steps."""

    def __init__(self, layout: Layout, gate_up: fx.Node, rows: Any, num_columns: int) -> None:
        self.layout = layout
        self.num_columns = num_columns
        self.width = num_columns if layout == "ungated" else num_columns // 2
        self.move = Movement(rows)
        self.steps = StepBuilder()
        #: The values that codes name.
        self.values: list[Value] = ["gate", "up"]
        #: What each node is: columns, or one number wherever it is read.
        self.tensors: dict[fx.Node, Columns | list[Columns] | bool | int | float] = {
            gate_up: Columns(self._gate_and_up().unsqueeze(0), -2)
        }

    def _gate_and_up(self) -> Tensor:
        positions = torch.arange(self.width, device="cpu")
        if self.layout == "ungated":
            return positions
        both = positions, positions + self.num_columns
        return torch.cat(both) if self.layout == "concatenated" else torch.stack(both, 1).flatten()

    def program(self, nodes: Sequence[fx.Node]) -> Program:
        for position, node in enumerate(nodes):
            try:
                self._node(node)
            except NotPointwise as refusal:
                raise _Refusal(f"{described(node)} {refusal}", position) from None
        try:
            return self._result(nodes[-1])
        except NotPointwise as refusal:
            raise _Refusal(str(refusal), len(nodes)) from None

    def _result(self, node: fx.Node) -> Program:
        result = self.tensors[node]
        if isinstance(result, list):
            raise NotPointwise("it must return one tensor, got several")
        if not isinstance(result, Columns):
            raise NotPointwise(f"it returns {result} everywhere, which no gate or up goes into")
        shape = node.meta["val"].shape
        if result.codes.shape != (1, self.width) or result.rows_dim != -2:
            raise NotPointwise(f"it returns {tuple(shape)} for rows of gate and up of {self.width}")
        codes = result.codes.flatten()
        first = int(codes[0]) // self.num_columns
        if not torch.equal(codes, torch.arange(self.width, device="cpu") + first * self.num_columns):
            raise NotPointwise("it returns columns in another order than gate and up have")
        value = self.steps.number(self.values[first])
        if not isinstance(value, str):
            raise NotPointwise(f"it returns {value} everywhere, which no gate or up goes into")
        return self.steps.program(self.layout, value)

    def _node(self, node: fx.Node) -> None:
        target: Any = node.target
        if node in self.tensors:
            return
        if is_number(node):
            number = number_of(node)
            assert number is not None
            self.tensors[node] = number
        elif node.op != "call_function":
            raise NotPointwise("is a captured tensor")
        elif target is operator.getitem:
            pieces = self._tensor(node.args[0])
            self.tensors[node] = pieces[node.args[1]] if isinstance(pieces, list) else pieces  # type: ignore[index]
        elif target in SAME_VALUE:
            self.tensors[node] = self._tensor(node.args[0])
        elif target in CONSTANTS:
            self._pointwise(node, lambda e, x: x, [CONSTANTS[target](node.args)])
        elif target in CASTS:
            self._cast(node)
        elif target in MOVES:
            self.tensors[node] = self._moved(node)
        elif target is aten.copy.default:
            source = self._tensor(node.args[1])
            if isinstance(source, Columns):
                source = self.move.expanded(source, node.meta["val"].shape)
            self._pointwise(node, lambda e, x: x, [source])
        elif target is aten.glu.default:
            source = self._tensor(node.args[0])
            if not isinstance(source, Columns):
                raise NotPointwise("takes a constant apart")
            dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
            self._pointwise(node, glu, halves(source, dim))
        elif target is aten.index_put.default:
            self._masked_write(node)
        elif target is act_and_mul:
            self._named_activation(node)
        elif target in FORMULAS or target in BITWISE:
            if target in BITWISE and node.meta["val"].dtype is not torch.bool:
                raise NotPointwise("works on the bits of integers")
            self._pointwise(node, FORMULAS.get(target) or BITWISE[target], list(node.args), dict(node.kwargs))
        else:
            raise NotPointwise("is not a pointwise operation an epilogue can hold")

    def _tensor(self, argument: Any) -> Any:
        """What an argument is: a node's columns or number, or the argument itself."""
        if isinstance(argument, fx.Node):
            if argument not in self.tensors:
                raise NotPointwise(f"takes {argument}, which is no number and no gate or up")
            return self.tensors[argument]
        return argument

    def _moved(self, node: fx.Node) -> Columns | list[Columns] | bool | int | float:
        nodes = moved_tensors(node)
        sources = [self._tensor(source) for source in nodes]
        columns = [source for source in sources if isinstance(source, Columns)]
        if not columns:
            if len({repr(source) for source in sources}) > 1:
                raise NotPointwise("puts several constants side by side")
            constant: bool | int | float = sources[0]
            return constant
        return self.move(
            node,
            [
                source if isinstance(source, Columns) else self._filled(source, of, columns[0].rows_dim)
                for source, of in zip(sources, nodes, strict=True)
            ],
        )

    def _filled(self, number: Value, of: fx.Node, rows_dim: int) -> Columns:
        """A tensor that holds one number; its positions mean nothing."""
        shape = self.move.one_row(of.meta["val"].shape, rows_dim)
        return Columns(torch.full(shape, self._code(number), device="cpu"), rows_dim)

    def _code(self, value: Value) -> int:
        # By text: 0.0, -0.0 and False are equal.
        texts = [repr(known) for known in self.values]
        if repr(value) not in texts:
            self.values.append(value)
            texts.append(repr(value))
        return texts.index(repr(value)) * self.num_columns

    def _cast(self, node: fx.Node) -> None:
        dtype: Any = node.kwargs.get("dtype", node.args[1] if len(node.args) > 1 else None)
        source: Any = node.args[0]
        given = source.meta["val"].dtype
        if dtype is None:
            dtype = given
        if dtype not in (*FLOATS, torch.bool) and (dtype.is_floating_point or given.is_floating_point):
            raise NotPointwise(f"casts to {dtype}")
        self._pointwise(node, lambda e, x: x, [source])

    def _named_activation(self, node: fx.Node) -> None:
        """The steps of a program that is there already."""
        arguments: Any = dict(zip(("gate_up", "epilogue"), node.args, strict=False)) | node.kwargs
        source, program = self._tensor(arguments["gate_up"]), parse(arguments["epilogue"])
        if not isinstance(source, Columns):
            raise NotPointwise("takes a constant apart")
        inputs = [source]
        if program.layout == "concatenated":
            inputs = halves(source, -1)
        elif program.layout == "interleaved":
            inputs = [Columns(source.codes[..., first::2], source.rows_dim) for first in (0, 1)]

        def formula(e: StepBuilder, gate: Value, up: Value = 0.0) -> Value:
            values = {"gate": gate, "up": up}
            for i, step in enumerate(program.steps):
                values[f"t{i}"] = e(step.op, *(values[o] if isinstance(o, str) else o for o in step.operands))
            return values[program.result]

        self._pointwise(node, formula, inputs)

    def _masked_write(self, node: fx.Node) -> None:
        """``x[mask] = number``."""
        x, indices, number, *accumulate = node.args
        mask: Any = indices[0] if isinstance(indices, list | tuple) and len(indices) == 1 else None
        is_mask = isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool
        if (
            not is_mask
            or mask.meta["val"].dim() != x.meta["val"].dim()  # type: ignore[union-attr]
            or isinstance(self._tensor(number), Columns)
            or any((*accumulate, *node.kwargs.values()))
        ):
            raise NotPointwise("writes elsewhere than one number by one mask")
        self._pointwise(node, where, [mask, number, x])

    def _pointwise(
        self, node: fx.Node, formula: Formula, args: list[Any], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Apply a formula to each combination of values that its tensors hold at one place."""
        args = [self._tensor(argument) for argument in args]
        named = {name: self._tensor(argument) for name, argument in (kwargs or {}).items()}
        if any(isinstance(argument, complex | list) for argument in (*args, *named.values())):
            raise NotPointwise("takes complex numbers or lists")
        tensors = [argument for argument in (*args, *named.values()) if isinstance(argument, Columns)]
        if not tensors:
            value = self._promoted(node, formula(self.steps, *args, **named))
            if isinstance(value, str):
                raise AssertionError("what only numbers go into is a number")
            self.tensors[node] = value
            return
        rows_dim = tensors[0].rows_dim
        shape = node.meta["val"].shape
        if any(tensor.rows_dim != rows_dim for tensor in tensors):
            raise NotPointwise("combines rows with columns")
        codes = torch.stack([self.move.expanded(tensor, shape).codes.flatten() for tensor in tensors])
        groups, group_of = torch.unique(codes // self.num_columns, dim=1, return_inverse=True)
        positions = self._positions(codes % self.num_columns, groups, group_of)
        results = []
        for group in groups.t().tolist():
            values = iter([self.values[i] for i in group])
            at = [next(values) if isinstance(a, Columns) else a for a in args]
            with_names = {k: next(values) if isinstance(a, Columns) else a for k, a in named.items()}
            results.append(self._code(self._promoted(node, formula(self.steps, *at, **with_names))))
        result = torch.tensor(results, device="cpu")[group_of] + positions
        self.tensors[node] = Columns(result.view(self.move.one_row(shape, rows_dim)), rows_dim)

    def _positions(self, positions: Tensor, groups: Tensor, group_of: Tensor) -> Tensor:
        """The position of every element, which is the same in all tensors, unless they hold a number there."""
        is_number = torch.tensor([not isinstance(value, str) for value in self.values], device="cpu")
        anywhere = is_number[groups][:, group_of]
        low = torch.where(anywhere, self.num_columns, positions).amin(0)
        high = torch.where(anywhere, -1, positions).amax(0)
        mixed = (low < high).nonzero().flatten()
        if len(mixed):
            a, b = int(low[mixed[0]]), int(high[mixed[0]])
            raise NotPointwise(
                f"combines elements {a} and {b} of gate and up, which are {self.width} each and {self.layout}"
                if self.layout != "ungated"
                else f"combines columns {a} and {b} of {self.width}"
            )
        return high.clamp(min=0)

    def _promoted(self, node: fx.Node, value: Value) -> Value:
        """The value as the kind of number that torch's result is."""
        dtype = node.meta["val"].dtype
        if dtype is torch.bool:
            return self.steps.boolean(value)
        if dtype.is_complex:
            raise NotPointwise("is complex")
        self._check_integers(dtype, value)
        return self.steps.number(value)

    def _check_integers(self, dtype: torch.dtype, value: Value) -> None:
        """Refuse integers that float32 might not hold, or that might wrap around."""
        if dtype.is_floating_point:
            return
        largest = min(torch.iinfo(dtype).max, _MOST_EXACT_INTEGER)
        if not dtype.is_signed or self.steps.bound(value) > largest:
            raise NotPointwise(f"computes in {dtype}, which float32 may not hold")
