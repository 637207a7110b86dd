"""Which rows of an expert's weights a tile has."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def weight_rows(
    column8,
    columns8,
    EPILOGUE: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    layout: gl.constexpr,
    ROWS: gl.constexpr = 64,
):
    """Rows of an expert's weights that a consumer multiplies (or both: 128), and whether there are such."""
    m = gl.arange(0, ROWS, layout=layout)
    if EPILOGUE == "gated":
        column = column8 * 8 + m // 16 * 8 + m % 8
        mask = column < columns8 * 8
        if INTERLEAVED:
            column = 2 * column + m // 8 % 2
        else:
            column = column + m // 8 % 2 * (columns8 * 8)
    elif EPILOGUE == "pairs":
        column = 2 * column8 * 8 + m
        mask = column < 2 * columns8 * 8
    else:
        column = column8 * 8 + m
        mask = column < columns8 * 8
    return column, mask
