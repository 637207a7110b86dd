"""Decoding weights: from the ring, where they are as they are stored, to the registers that consumers multiply.

A thread has rows and columns of them as the tensor cores take them, two neighbouring columns at a time.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.quantized.arithmetic import difference, times
from compile_moe.ops.kernels.quantized.few_rows.layouts import doubled
from compile_moe.ops.kernels.quantized.weight_format import decode, decode_pairs, decode_scale_16_bits
from compile_moe.ops.kernels.warp_specialized.compat import view
from compile_moe.ops.kernels.warp_specialized.weight_rows import weight_rows

COLUMNS = gl.constexpr(64)  # of a step


@gluon.constexpr_function
def pairs_layout() -> Any:
    """Of 64 rows, 32 pairs of columns."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )


@gluon.constexpr_function
def groups_layout(GROUP: int) -> Any:
    """Of 64 rows, the groups of a step."""
    groups = max(COLUMNS.value // GROUP, 1)
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], *([0, g] for g in doubled(1, groups))],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, groups],
    )


@gluon.jit
def group_ptrs(
    scales,  # pointer, strides of experts, rows and groups
    zeros,
    expert,
    column8,
    columns8,
    EPILOGUE: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    GROUP: gl.constexpr,
):
    """To the first group's scales and zero points of a consumer's weight rows; which there are; their rows."""
    layout: gl.constexpr = gl.SliceLayout(1, groups_layout(GROUP))
    row, mask = weight_rows(column8, columns8, EPILOGUE, INTERLEAVED, layout)
    expert = expert.to(gl.int64)
    scale_ptrs = scales[0] + expert * scales[1] + row.to(gl.int64) * scales[2]
    zero_ptrs = zeros[0] + expert * zeros[1] + (row // PACKED_ZEROS).to(gl.int64) * zeros[2]
    return scale_ptrs, zero_ptrs, mask, row


@gluon.jit
def load_groups(ptrs, mask, stride, k, num_groups, GROUP: gl.constexpr):
    """(64, groups) of step k; zeros behind the last group and where there is no row."""
    GROUPS: gl.constexpr = COLUMNS // GROUP if COLUMNS > GROUP else 1
    layout: gl.constexpr = groups_layout(GROUP)
    group = k * COLUMNS // GROUP + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, layout))
    group = gl.expand_dims(group, 0)
    valid = gl.expand_dims(mask, 1) & (group < num_groups)
    return gl.load(gl.expand_dims(ptrs, 1) + group.to(gl.int64) * stride, mask=valid, other=0)


@gluon.jit
def load_pairs(w_smem, i, PACKED: gl.constexpr):
    """A consumer's rows of a stage: pairs of weights as words (64, 32)."""
    if PACKED == 1:
        layout: gl.constexpr = gl.NVMMASharedLayout(COLUMNS, 16, 2)
        pairs = view(w_smem, [w_smem.shape[0], 64, COLUMNS // 2], layout, gl.uint16)
    else:
        pairs = w_smem
    return pairs.index(i).load(pairs_layout()).to(gl.uint32)


@gluon.jit
def by_groups(weights, numbers):
    """Weights (64, COLUMNS) as (64, groups, columns), and numbers (64, groups) as (64, groups, 1)."""
    GROUPS: gl.constexpr = numbers.shape[1]
    weights = gl.reshape(weights, [64, GROUPS, COLUMNS // GROUPS])
    numbers = gl.convert_layout(numbers, gl.SliceLayout(2, weights.type.layout), assert_trivial=True)
    return weights, gl.expand_dims(numbers, 2)


@gluon.jit
def decoded(
    words,
    dtype: gl.constexpr,
    scales,  # (64, groups) as stored, or None
    zeros,
    zero_row,  # (64,) that of each row's zero point
    PACKED_ZEROS: gl.constexpr,
    layout: gl.constexpr,
):
    """(64, COLUMNS) of pairs, less zero points, times scales, as the left operand that ``layout`` is."""
    # Two of each pair's words, since two numbers share a register.
    w = gl.reshape(decode_pairs(gl.join(words, words), dtype), [64, COLUMNS])
    if zeros is not None:
        if PACKED_ZEROS > 1:
            shift = gl.expand_dims(zero_row, 1) % PACKED_ZEROS * (8 // PACKED_ZEROS)
            zeros = (zeros.to(gl.int32) >> shift) & ((1 << (8 // PACKED_ZEROS)) - 1)
        w, by = by_groups(w, decode(zeros).to(dtype))
        # Exact: both are small integers.
        w = gl.reshape(difference(w, by), [64, COLUMNS])
    if scales is not None:
        w, by = by_groups(w, decode_scale_16_bits(scales, dtype))
        w = gl.reshape(times(w, by), [64, COLUMNS])
    return gl.convert_layout(w, layout, assert_trivial=True)
