"""What a tile loads: which rows of the weights, copies to shared memory, scales and zero points."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.quantized.few_rows.layouts import STEP_BYTES
from compile_moe.ops.kernels.warp_specialized.compat import copy_rows


@gluon.jit
def weight_row(row, tile_n, num_columns, LAYOUT: gl.constexpr, ROWS: gl.constexpr, EVEN_N: gl.constexpr):
    """Of the expert's weights, that of a tile's row; rows behind the last column read that one's.

    Of each 16 rows, gate and up projection have 8, which are in the same thread then.
    """
    if LAYOUT == "ungated":
        column = tile_n * ROWS + row
        if not EVEN_N:
            column = gl.minimum(column, num_columns - 1)
    else:
        column = tile_n * (ROWS // 2) + row // 16 * 8 + row % 8
        if not EVEN_N:
            column = gl.minimum(column, num_columns - 1)
        if LAYOUT == "interleaved":
            column = 2 * column + row // 8 % 2
        else:
            column = column + row // 8 % 2 * num_columns
    return column


@gluon.jit
def copy_weights(smem, ptrs, step, depth, PACKED: gl.constexpr, EVEN_K: gl.constexpr):
    """Weights of a step on their way to shared memory; zeros behind the depth."""
    if EVEN_K:
        copy_rows(smem, ptrs + step * STEP_BYTES)
    else:
        b = gl.arange(0, STEP_BYTES, layout=gl.SliceLayout(0, ptrs.type.layout))
        # A multiple of 16: Triton copies 16 bytes where a mask can't change within them.
        left = depth // (16 * PACKED) * 16 - step * STEP_BYTES
        copy_rows(smem, ptrs + step * STEP_BYTES, gl.expand_dims(b < left, 0))


@gluon.jit
def copy_tokens(smem, ptrs, row_mask, step, depth, EVEN_K: gl.constexpr):
    """Tokens of a step on their way to shared memory; zeros behind the depth, and in rows that are not."""
    STEP: gl.constexpr = smem.shape[1]
    mask = gl.expand_dims(row_mask, 1)
    if not EVEN_K:
        k = gl.arange(0, STEP, layout=gl.SliceLayout(0, ptrs.type.layout))
        mask = mask & gl.expand_dims(k < depth // 16 * 16 - step * STEP, 0)
    copy_rows(smem, ptrs + step * STEP, mask)


@gluon.jit
def load_scales(ptrs, group, num_groups, stride, SCALES: gl.constexpr):
    """(SCALES, positions) from pointers (positions,); zeros behind the last group."""
    layout: gl.constexpr = ptrs.type.layout.parent
    groups = group + gl.arange(0, SCALES, layout=gl.SliceLayout(1, layout))
    offsets = groups.to(gl.int64) * stride
    mask = gl.expand_dims(groups < num_groups, 1)
    return gl.load(gl.expand_dims(ptrs, 0) + gl.expand_dims(offsets, 1), mask=mask, other=0)


@gluon.jit
def unpacked(zeros, row, PACKED_ZEROS: gl.constexpr, GROUPS_AXIS: gl.constexpr):
    """Each row's of the zero points that PACKED_ZEROS rows share; groups are the dimension GROUPS_AXIS."""
    if PACKED_ZEROS > 1:
        shift = gl.expand_dims(row % PACKED_ZEROS * (8 // PACKED_ZEROS), GROUPS_AXIS)
        zeros = (zeros.to(gl.int32) >> shift) & ((1 << (8 // PACKED_ZEROS)) - 1)
    return zeros
