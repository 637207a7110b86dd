"""Which thread holds which numbers.

The tensor cores' instruction (mma.m16n8k16) wants of lane 4 g + t columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of each 16.
The order of columns in a sum is free: a thread takes 8 consecutive bytes of a row instead, and the tokens' columns are
put in the same order. So nothing moves between threads, and loads are 8 bytes wide or wider.

Source: the PTX manual, "Matrix Fragments for mma.m16n8k16 with floating point type".
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

STEP_BYTES = gl.constexpr(128)  # of a row of weights, a stage
PART_BYTES = gl.constexpr(32)  # 8 a thread


@gluon.constexpr_function
def doubled(first: int, behind: int) -> Any:
    """first, 2 * first, 4 * first, ... below ``behind``."""
    numbers = []
    while first < behind:
        numbers.append(first)
        first *= 2
    return numbers


@gluon.constexpr_function
def products(WARPS: int) -> Any:
    """Sums (rows of weights, tokens)."""
    return gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])


@gluon.constexpr_function
def stored_weights(ROWS: int, WARPS: int) -> Any:
    """Bytes (ROWS, STEP_BYTES) of a stage."""
    return gl.DistributedLinearLayout(
        reg_bases=[
            *([0, b] for b in doubled(1, 8)),
            [8, 0],
            *([r, 0] for r in doubled(16 * WARPS, ROWS)),
            *([0, b] for b in doubled(PART_BYTES, STEP_BYTES)),
        ],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[r, 0] for r in doubled(16, 16 * WARPS)],
        block_bases=[],
        shape=[ROWS, STEP_BYTES],
    )


@gluon.constexpr_function
def stored_tokens(TOKENS: int, WARPS: int, PACKED: int) -> Any:
    """Tokens' columns (TOKENS, STEP_BYTES * PACKED) of a stage, in every warp."""
    mine, part, step = 8 * PACKED, PART_BYTES * PACKED, STEP_BYTES * PACKED
    return gl.DistributedLinearLayout(
        reg_bases=[
            *([0, c] for c in doubled(1, mine)),
            *([r, 0] for r in doubled(8, TOKENS)),
            *([0, c] for c in doubled(part, step)),
        ],
        lane_bases=[[0, mine], [0, 2 * mine], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 0] for _ in doubled(1, WARPS)],
        block_bases=[],
        shape=[TOKENS, step],
    )


@gluon.constexpr_function
def stored_results(WARPS: int) -> Any:
    """Results (tokens, columns), 8 a thread."""
    return gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def scales_of_rows(GROUPS: int, ROWS: int, WARPS: int) -> Any:
    """Scales (GROUPS, ROWS) of a part, where a thread's rows follow one another (see :func:`row_at`)."""
    mine = ROWS // (8 * WARPS)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, r] for r in doubled(1, mine)],
        lane_bases=[[0, 0], [GROUPS - 1, 0], *([0, r] for r in doubled(mine, 8 * mine))],
        warp_bases=[[0, r] for r in doubled(8 * mine, ROWS)],
        block_bases=[],
        shape=[GROUPS, ROWS],
    )


@gluon.jit
def row_at(position, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """The row of the tile whose scales lie at a position."""
    MINE: gl.constexpr = ROWS // (8 * WARPS)
    mine = position % MINE
    lane = position // MINE % 8
    warp = position // (8 * MINE)
    return ((mine // 2 * WARPS + warp) * 2 + mine % 2) * 8 + lane


@gluon.jit
def scales_by_row(scales, WARPS: gl.constexpr):
    """(ROWS, GROUPS) from (GROUPS, positions)."""
    GROUPS: gl.constexpr = scales.shape[0]
    ROWS: gl.constexpr = scales.shape[1]
    MINE: gl.constexpr = ROWS // (8 * WARPS)
    scales = gl.reshape(scales, [GROUPS, WARPS, 8, MINE // 2, 2])
    return gl.reshape(gl.permute(scales, (3, 1, 4, 2, 0)), [ROWS, GROUPS])


@gluon.jit
def halves(t):
    """The first and the last columns of (rows, 2 n)."""
    ROWS: gl.constexpr = t.shape[0]
    HALF: gl.constexpr = t.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(t, [ROWS, 2, HALF]), (0, 2, 1)))


@gluon.jit
def parts(t):
    """The four parts of a step, which are along columns."""
    gl.static_assert(STEP_BYTES == 4 * PART_BYTES)
    first, last = halves(t)
    a, b = halves(first)
    c, d = halves(last)
    return a, b, c, d


@gluon.jit
def as_left_operand(weights, WARPS: gl.constexpr):
    """Numbers (ROWS, PART_BYTES) decoded from bytes, in columns of the instruction's order."""
    ROWS: gl.constexpr = weights.shape[0]
    layout: gl.constexpr = gl.DotOperandLayout(0, products(WARPS), 2)
    weights = gl.permute(gl.reshape(weights, [ROWS, 4, 2, 2, 2]), (0, 2, 3, 1, 4))
    return gl.convert_layout(gl.reshape(weights, [ROWS, PART_BYTES]), layout, assert_trivial=True)


@gluon.jit
def as_right_operand(tokens, WARPS: gl.constexpr):
    """Columns (TOKENS, PART_BYTES), one a byte, transposed, in the order of :func:`as_left_operand`; what was decoded
    from a word are its bytes 0, 2, 1, 3.
    """
    TOKENS: gl.constexpr = tokens.shape[0]
    layout: gl.constexpr = gl.DotOperandLayout(1, products(WARPS), 2)
    tokens = gl.permute(gl.reshape(tokens, [TOKENS, 4, 2, 2, 2]), (0, 2, 4, 1, 3))
    tokens = gl.permute(gl.reshape(tokens, [TOKENS, PART_BYTES]), (1, 0))
    return gl.convert_layout(tokens, layout, assert_trivial=True)
