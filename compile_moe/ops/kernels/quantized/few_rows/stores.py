"""Where a tile's results go."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.quantized.few_rows.layouts import stored_results


@gluon.jit
def result_rows(first_row, TOKENS: gl.constexpr, WARPS: gl.constexpr):
    """Rows first_row... of a tile, for :func:`store_results`."""
    return first_row + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, stored_results(WARPS)))


@gluon.jit
def store_results(out_ptr, y, row, row_mask, tile_n, num_columns, WARPS: gl.constexpr):
    """y (TOKENS, columns of tile_n) as rows ``row`` of out, where row_mask is true."""
    layout: gl.constexpr = stored_results(WARPS)
    column = tile_n * y.shape[1] + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, layout))
    ptrs = out_ptr + gl.expand_dims(row.to(gl.int64) * num_columns, 1) + gl.expand_dims(column, 0)
    mask = gl.expand_dims(row_mask, 1) & gl.expand_dims(column < num_columns, 0)
    gl.store(ptrs, gl.convert_layout(y, layout), mask=mask)
