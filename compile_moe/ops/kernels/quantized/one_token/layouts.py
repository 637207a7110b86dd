"""Which thread holds which numbers: as for few rows, but a thread takes four consecutive words of a row of weights.

Weights come straight from memory to the registers of who multiplies them; a warp has 16 rows, of which it takes chunks
of 64 bytes, four threads each.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.quantized.few_rows.layouts import doubled

ROWS_OF_WARP = gl.constexpr(16)
CHUNK_BYTES = gl.constexpr(64)
CHUNKS = gl.constexpr(2)  # of a step
STEP_BYTES = gl.constexpr(CHUNKS.value * CHUNK_BYTES.value)


@gluon.constexpr_function
def stored_weights(WARPS: int) -> Any:
    """Words (16 * WARPS, STEP_BYTES / 4) of a step."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *([0, w] for w in doubled(16, STEP_BYTES.value // 4))],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[r, 0] for r in doubled(16, 16 * WARPS)],
        block_bases=[],
        shape=[16 * WARPS, STEP_BYTES.value // 4],
    )


@gluon.constexpr_function
def stored_tokens(WARPS: int, PACKED: int) -> Any:
    """Columns (8 * WARPS, 64 * PACKED) of a chunk; a warp has 8 tokens."""
    mine = 16 * PACKED
    return gl.DistributedLinearLayout(
        reg_bases=[[0, c] for c in doubled(1, mine)],
        lane_bases=[[0, mine], [0, 2 * mine], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[t, 0] for t in doubled(8, 8 * WARPS)],
        block_bases=[],
        shape=[8 * WARPS, 4 * mine],
    )


@gluon.constexpr_function
def stored_token_words(WARPS: int) -> Any:
    """Words (8 * WARPS, CHUNK_BYTES / 4) of a chunk of quantized tokens, as those of weights."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[t, 0] for t in doubled(8, 8 * WARPS)],
        block_bases=[],
        shape=[8 * WARPS, CHUNK_BYTES.value // 4],
    )


@gluon.constexpr_function
def stored_segments(WARPS: int) -> Any:
    """Columns (2 * WARPS, STEP_BYTES) of a step of tokens that are still to be quantized; a warp has 2 segments, in 16
    neighbouring threads each: where they are others, Triton 3.6 compiles reductions of rows wrongly.
    """
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4]],
        lane_bases=[[0, 8], [0, 16], [0, 32], [0, 64], [1, 0]],
        warp_bases=[[s, 0] for s in doubled(2, 2 * WARPS)],
        block_bases=[],
        shape=[2 * WARPS, STEP_BYTES.value],
    )


@gluon.constexpr_function
def columns_of_segments(WARPS: int) -> Any:
    """The same (WARPS, 4, 2, STEP_BYTES), four of each: as two chunks of stored tokens."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, c] for c in (*doubled(1, 16), *doubled(64, STEP_BYTES.value))],
        lane_bases=[[0, 0, 0, 16], [0, 0, 0, 32], [0, 0, 1, 0], [0, 1, 0, 0], [0, 2, 0, 0]],
        warp_bases=[[w, 0, 0, 0] for w in doubled(1, WARPS)],
        block_bases=[],
        shape=[WARPS, 4, 2, STEP_BYTES.value],
    )


@gluon.constexpr_function
def stored_scales(WARPS: int, PACKED: int, GROUP: int) -> Any:
    """Scales (16 * WARPS, CHUNKS) of a step where a chunk has one, (16 * WARPS, 4 * CHUNKS) where each thread has."""
    of_chunk = 1 if 64 * PACKED <= GROUP else 4
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], *([0, p] for p in doubled(of_chunk, of_chunk * CHUNKS.value))],
        lane_bases=[*([[0, 0], [0, 0]] if of_chunk == 1 else [[0, 1], [0, 2]]), [1, 0], [2, 0], [4, 0]],
        warp_bases=[[r, 0] for r in doubled(16, 16 * WARPS)],
        block_bases=[],
        shape=[16 * WARPS, of_chunk * CHUNKS.value],
    )


@gluon.constexpr_function
def products(WARPS: int) -> Any:
    """Sums (WARPS, 16, 8) of each warp's rows of weights and its tokens."""
    return gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])


@gluon.jit
def as_left_operand(numbers, WARPS: gl.constexpr):
    """Numbers (16 * WARPS, 32) decoded from bytes, in columns of the instruction's order."""
    layout: gl.constexpr = gl.DotOperandLayout(0, products(WARPS), 2)
    numbers = gl.permute(gl.reshape(numbers, [16 * WARPS, 4, 2, 2, 2]), (0, 2, 3, 1, 4))
    return gl.convert_layout(gl.reshape(numbers, [WARPS, 16, 32]), layout, assert_trivial=True)


@gluon.jit
def as_right_operand(tokens, WARPS: gl.constexpr, DECODED: gl.constexpr):
    """Columns (8 * WARPS, 32), one a byte, transposed, in that order; what was decoded from a word are its bytes 0, 2,
    1, 3.

    Args:
        DECODED: tokens were, too.
    """
    layout: gl.constexpr = gl.DotOperandLayout(1, products(WARPS), 2)
    tokens = gl.reshape(tokens, [8 * WARPS, 4, 2, 2, 2])
    if DECODED:
        tokens = gl.permute(tokens, (0, 2, 3, 1, 4))
    else:
        tokens = gl.permute(tokens, (0, 2, 4, 1, 3))
    tokens = gl.permute(gl.reshape(tokens, [WARPS, 8, 32]), (0, 2, 1))
    return gl.convert_layout(tokens, layout, assert_trivial=True)


@gluon.jit
def eights(t):
    """Of a chunk (rows, 4 * 2 * n), the first and the last n of each thread: two of (rows, 4 * n)."""
    ROWS: gl.constexpr = t.shape[0]
    N: gl.constexpr = t.shape[1] // 8
    first, last = gl.split(gl.permute(gl.reshape(t, [ROWS, 4, 2, N]), (0, 1, 3, 2)))
    return gl.reshape(first, [ROWS, 4 * N]), gl.reshape(last, [ROWS, 4 * N])
