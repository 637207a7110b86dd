"""A GEMM as the choice of its tile sees it: everything but the number of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compile_moe.ops.kernels.precision import Precision
from compile_moe.ops.kernels.tiles import is_vectorized, row_stride


class Shape(NamedTuple):
    """Sizes of a layer's experts: E, K and I (N where the first GEMM has no epilogue)."""

    num_experts: int
    hidden_size: int
    intermediate_size: int


class GemmProblem(NamedTuple):
    """One of the two GEMMs on experts of one shape.

    gemm: "gather_gemm" or "scatter_gemm". dtype: of the operands, without "torch.". precision: as ``dot_precision``
    calls it. layout: of gate and up; "ungated" for scatter_gemm. transposed: a row of the weights does not lie in one
    piece. vectorized: as ``is_vectorized`` says. has_boxes: the tensor memory accelerator can read the operands.
    """

    gemm: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: str
    precision: str
    layout: str
    transposed: bool
    vectorized: bool
    has_boxes: bool

    @property
    def shape(self) -> Shape:
        return Shape(self.num_experts, self.hidden_size, self.intermediate_size)

    @property
    def itemsize(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize

    @property
    def num_columns(self) -> int:
        """Of one accumulator's matrix."""
        return self.intermediate_size if self.gemm == "gather_gemm" else self.hidden_size

    @property
    def depth(self) -> int:
        return self.hidden_size if self.gemm == "gather_gemm" else self.intermediate_size

    @property
    def num_accumulators(self) -> int:
        return 1 if self.layout == "ungated" else 2


def gemm_problem(
    gemm: str, out: Tensor, x: Tensor, w: Tensor, layout: str, precision: Precision
) -> GemmProblem:
    """The problem that out (S, columns), x (rows, depth) and w (E, rows of weights, depth) pose."""
    num_columns, depth = out.size(1), w.size(2)
    hidden, intermediate = (depth, num_columns) if gemm == "gather_gemm" else (num_columns, depth)
    return GemmProblem(
        gemm,
        w.size(0),
        hidden,
        intermediate,
        str(out.dtype).removeprefix("torch."),
        precision,
        layout,
        w.stride(2) != 1,
        is_vectorized(x, w),
        has_boxes(x, w, out, layout),
    )


def has_boxes(x: Tensor, w: Tensor, out: Tensor, layout: str = "ungated") -> bool:
    """Whether the tensor memory accelerator, or loads of 16 bytes, read x (rows, depth) and w (E, rows, depth) of x's
    dtype, and out (S, columns) is written 16 bytes at a time: elements of 16 bits (of x and w also 8), rows in one
    piece, sizes and strides in multiples of 16 bytes, and nothing expanded. 16-bit weights may also be stored as (E,
    depth, rows), but not with all gates before all ups.
    """
    if x.element_size() == 2 and w.stride(1) == 1 and w.stride(2) != 1 and layout != "concatenated":
        w = w.transpose(1, 2)
    sizes = [size * x.element_size() for size in (row_stride(x), *w.stride()[:-1], w.size(2), x.size(1))]
    sizes.append(out.size(1) * out.element_size())
    return (
        x.dtype is w.dtype
        and x.element_size() <= out.element_size() == 2
        and x.stride(1) == w.stride(2) == 1
        and all(size % 16 == 0 and size > 0 for size in sizes)
        and all(t.data_ptr() % 16 == 0 for t in (x, w, out))
    )
