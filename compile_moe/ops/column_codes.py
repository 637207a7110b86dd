"""Where the columns of GEMM 1's result are in a tensor that views, slices and in-place writes made of them.

A tensor of ``rows`` rows is followed by the tensor of its codes: of the same shape, but with one row, since all rows
are alike. Each code says which value an element holds, and at which position of a row's output:
``value * num_columns + position``. What moves elements moves codes in the same way, so that any of torch's views
means here what it means there. Only what would mix rows is refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from compile_moe.ops.aten_formulas import NotPointwise

aten = torch.ops.aten


class Columns(NamedTuple):
    """Codes of a tensor whose rows are dimension ``rows_dim``, counted from the last: -1 is the last."""

    codes: Tensor
    rows_dim: int

    def at(self, dim: int) -> bool:
        """Whether ``dim``, counted from either end, is that of the rows."""
        return dim in (self.rows_dim, self.rows_dim + self.codes.dim())


class Movement:
    """What moves the columns of a tensor of ``rows`` rows, which may be symbolic."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __call__(self, node: fx.Node, operands: list[Columns]) -> Columns | list[Columns]:
        """What ``node``, a target of :data:`MOVES`, makes of its tensors."""
        return _MOVES[node.target](self, node, *operands)

    def one_row(self, shape: Any, rows_dim: int) -> list[int]:
        """The shape of the codes of a tensor of this shape, with rows at this dimension from the last."""
        sizes: list[Any] = list(shape)
        if -rows_dim > len(sizes) or not self._are_rows(sizes[rows_dim]):
            raise NotPointwise(f"has the shape {tuple(shape)}, whose rows are not those of gate and up")
        sizes[rows_dim] = 1
        if not all(isinstance(size, int) for size in sizes):
            raise NotPointwise(f"has the shape {tuple(shape)}, with a dynamic number of columns")
        return sizes

    def _are_rows(self, size: Any) -> bool:
        # Comparing symbols would guard on their values.
        return str(size) == str(self.rows)

    def expanded(self, columns: Columns, shape: Any) -> Columns:
        return Columns(columns.codes.expand(self.one_row(shape, columns.rows_dim)), columns.rows_dim)

    def reshape(self, node: fx.Node, columns: Columns) -> Columns:
        """Views in row-major order: the rows stay together while as many elements are in front of them."""
        shape = node.meta["val"].shape
        in_front = math.prod(columns.codes.shape[: columns.rows_dim])
        for dim in range(len(shape)):
            is_static = all(isinstance(size, int) for size in shape[:dim])
            if self._are_rows(shape[dim]) and is_static and math.prod(shape[:dim]) == in_front:
                rows_dim = dim - len(shape)
                return Columns(columns.codes.reshape(self.one_row(shape, rows_dim)), rows_dim)
        raise NotPointwise("moves elements between rows")

    def expand(self, node: fx.Node, columns: Columns) -> Columns:
        return self.expanded(columns, node.meta["val"].shape)

    def permute(self, node: fx.Node, columns: Columns) -> Columns:
        dims = list(range(columns.codes.dim()))
        if node.target is aten.permute.default:
            given: Any = node.args[1]
            dims = [dims[d] for d in given]
        else:
            a: Any = node.args[1] if len(node.args) > 1 else 0
            b: Any = node.args[2] if len(node.args) > 2 else -1
            dims[a], dims[b] = dims[b], dims[a]
        rows_dim = dims.index(columns.codes.dim() + columns.rows_dim) - len(dims)
        return Columns(columns.codes.permute(dims), rows_dim)

    def slice(self, node: fx.Node, columns: Columns) -> Columns:
        dim, start, end, step = _slice_arguments(node, 1)
        if columns.at(dim):
            self._require_all_rows(start, end, step)
            return columns
        return Columns(aten.slice.Tensor(columns.codes, dim, start, end, step), columns.rows_dim)

    def slice_scatter(self, node: fx.Node, columns: Columns, source: Columns) -> Columns:
        dim, start, end, step = _slice_arguments(node, 2)
        if columns.at(dim):
            self._require_all_rows(start, end, step)
            return source
        return Columns(
            aten.slice_scatter.default(columns.codes, source.codes, dim, start, end, step), columns.rows_dim
        )

    def _require_all_rows(self, start: Any, end: Any, step: Any) -> None:
        to_the_end = end in (None, sys.maxsize) or self._are_rows(end)
        if isinstance(end, int) and isinstance(self.rows, int):
            to_the_end = end >= self.rows
        if start not in (None, 0) or not to_the_end or step != 1:
            raise NotPointwise("selects rows")

    def select(self, node: fx.Node, columns: Columns) -> Columns:
        dim, index = _plain(node.args[1:3])
        return self._selected(columns, dim, index)

    def select_scatter(self, node: fx.Node, columns: Columns, source: Columns) -> Columns:
        dim, index = _plain(node.args[2:4])
        if columns.at(dim):
            raise NotPointwise("selects rows")
        return Columns(aten.select_scatter.default(columns.codes, source.codes, dim, index), columns.rows_dim)

    def _selected(self, columns: Columns, dim: int, index: int) -> Columns:
        if columns.at(dim):
            raise NotPointwise("selects rows")
        dim %= columns.codes.dim()
        behind_rows = dim > columns.codes.dim() + columns.rows_dim
        return Columns(columns.codes.select(dim, index), columns.rows_dim + behind_rows)

    def unbind(self, node: fx.Node, columns: Columns) -> list[Columns]:
        (dim,) = _plain(node.args[1:2]) or (0,)
        return [self._selected(columns, dim, i) for i in range(columns.codes.size(dim))]

    def split(self, node: fx.Node, columns: Columns) -> list[Columns]:
        named: dict[str, Any] = dict(node.kwargs)
        dim = named.pop("dim", node.args[2] if len(node.args) > 2 else 0)
        sizes = node.args[1] if len(node.args) > 1 else next(iter(named.values()))
        if columns.at(dim):
            raise NotPointwise("splits rows")
        (sizes, dim) = _plain((sizes, dim))
        target: Any = node.target
        return [Columns(piece, columns.rows_dim) for piece in target(columns.codes, sizes, dim)]

    def cat(self, node: fx.Node, *columns: Columns) -> Columns:
        named: dict[str, Any] = {"dim": node.args[1] if len(node.args) > 1 else 0} | node.kwargs
        (dim,) = _plain((named["dim"],))
        if any(c.at(dim) or c.rows_dim != columns[0].rows_dim for c in columns):
            raise NotPointwise("concatenates rows")
        return Columns(torch.cat([c.codes for c in columns], dim), columns[0].rows_dim)


def moved_tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors of which ``node``, a target of :data:`MOVES`, moves elements."""
    if node.target is aten.cat.default:
        several: Any = node.args[0]
        return list(several)
    scatters = node.target in (aten.slice_scatter.default, aten.select_scatter.default)
    sources: Any = node.args[: 2 if scatters else 1]
    return list(sources)


def halves(columns: Columns, dim: int) -> list[Columns]:
    if columns.at(dim):
        raise NotPointwise("splits rows")
    return [Columns(half, columns.rows_dim) for half in columns.codes.chunk(2, dim)]


def _slice_arguments(node: fx.Node, first: int) -> tuple[Any, Any, Any, Any]:
    named = dict(zip(("dim", "start", "end", "step"), node.args[first:], strict=False)) | node.kwargs
    dim: Any = named.get("dim", 0)
    end: Any = named.get("end")
    if isinstance(end, fx.Node):
        # A number of rows; of columns there is only a static one.
        end = end.meta["val"]
    return dim, named.get("start"), end, named.get("step", 1)


def _plain(arguments: Any) -> tuple[Any, ...]:
    if any(isinstance(a, fx.Node) for a in arguments):
        raise NotPointwise("has computed arguments")
    return tuple(arguments)


_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
)
_MOVES: dict[Any, Callable[..., Columns | list[Columns]]] = {
    **dict.fromkeys(_RESHAPES, Movement.reshape),
    **dict.fromkeys(_SPLITS, Movement.split),
    aten.expand.default: Movement.expand,
    aten.permute.default: Movement.permute,
    aten.transpose.int: Movement.permute,
    aten.t.default: Movement.permute,
    aten.slice.Tensor: Movement.slice,
    aten.select.int: Movement.select,
    aten.unbind.int: Movement.unbind,
    aten.slice_scatter.default: Movement.slice_scatter,
    aten.select_scatter.default: Movement.select_scatter,
    aten.cat.default: Movement.cat,
}
#: The operations of aten that move elements within rows.
MOVES = frozenset(_MOVES)
