"""Decoding weights: from the ring of those as they are stored into the ring that consumers read."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from compile_moe.ops.kernels.quantized.arithmetic import difference, times
from compile_moe.ops.kernels.quantized.weight_format import decode, decode_16_bits, decode_scale_16_bits
from compile_moe.ops.kernels.warp_specialized.compat import view, warps_barrier
from compile_moe.ops.kernels.warp_specialized.consumer import weight_rows
from compile_moe.ops.kernels.warp_specialized.stored_weights import COLUMNS


@gluon.jit
def group_ptrs(
    scales,
    zeros,
    expert,
    tile_n,
    columns8,
    EPILOGUE: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
):
    """To the first group's scales and zero points of 128 weight rows, a row a thread; which there are; their rows."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 1], [32, 1], [4, 1], [1, 0]))
    WIDTH8: gl.constexpr = 8 if EPILOGUE == "gated" else 16
    row, mask = weight_rows(tile_n * WIDTH8, columns8, EPILOGUE, INTERLEAVED, layout, 128)
    expert = expert.to(gl.int64)
    scale_ptrs = scales[0] + expert * scales[1] + row.to(gl.int64) * scales[2]
    zero_ptrs = zeros[0] + expert * zeros[1] + (row // PACKED_ZEROS).to(gl.int64) * zeros[2]
    return scale_ptrs, zero_ptrs, mask, row


@gluon.jit
def load_groups(ptrs, mask, stride, k, num_groups, GROUP: gl.constexpr):
    """(128, groups) of step k; zeros behind the last group and where there is no row."""
    GROUPS: gl.constexpr = COLUMNS // GROUP if COLUMNS > GROUP else 1
    layout: gl.constexpr = gl.BlockedLayout([1, GROUPS], [32, 1], [4, 1], [1, 0])
    ptrs = gl.expand_dims(gl.convert_layout(ptrs, gl.SliceLayout(1, layout)), 1)
    mask = gl.expand_dims(gl.convert_layout(mask, gl.SliceLayout(1, layout)), 1)
    first = k * COLUMNS // GROUP
    group = gl.expand_dims(first + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, layout)), 0)
    return gl.load(ptrs + group.to(gl.int64) * stride, mask=mask & (group < num_groups), other=0)


@gluon.jit
def by_groups(weights, numbers):
    """Weights (128, COLUMNS) as (128, groups, columns), and numbers (128, groups) as (128, groups, 1)."""
    GROUPS: gl.constexpr = numbers.shape[1]
    weights = gl.reshape(weights, [128, GROUPS, COLUMNS // GROUPS])
    numbers = gl.convert_layout(numbers, gl.SliceLayout(2, weights.type.layout))
    return weights, gl.expand_dims(numbers, 2)


@gluon.jit
def decode_step(
    smem,
    slot,
    w_smem,
    stage,
    scales,  # (128, groups) as stored, or None
    zeros,
    zero_row,  # (128,) that of each row's zero point
    PACKED: gl.constexpr,
    PACKED_ZEROS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Weights of a slot, less zero points, times scales, to a stage of the ring; behind this, every warp's."""
    dtype: gl.constexpr = w_smem.dtype
    codes = smem.index(slot).load(gl.BlockedLayout([1, COLUMNS // PACKED], [32, 1], [4, 1], [1, 0]))
    if PACKED == 2:
        low, high = decode_16_bits(codes, dtype)
        w = gl.reshape(gl.join(low, high), [128, COLUMNS])
    else:
        w = decode_16_bits(codes, dtype)
    if zeros is not None:
        if PACKED_ZEROS > 1:
            row = gl.expand_dims(gl.convert_layout(zero_row, gl.SliceLayout(1, zeros.type.layout)), 1)
            shift = row % PACKED_ZEROS * (8 // PACKED_ZEROS)
            zeros = (zeros.to(gl.int32) >> shift) & ((1 << (8 // PACKED_ZEROS)) - 1)
        w, by = by_groups(w, decode(zeros).to(dtype))
        # Exact: both are small integers.
        w = gl.reshape(difference(w, by), [128, COLUMNS])
    if scales is not None:
        w, by = by_groups(w, decode_scale_16_bits(scales, dtype))
        w = gl.reshape(times(w, by), [128, COLUMNS])
    view(w_smem, [STAGES, 128, COLUMNS], w_smem.layout).index(stage).store(w)
    # For the tensor cores, which read past the generic proxy.
    fence_async_shared()
    warps_barrier()
