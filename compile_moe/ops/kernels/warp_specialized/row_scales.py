"""Scales of whole rows: of tokens and of weights, which multiply the sums of a tile when all are there."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.warp_specialized.compat import copy_rows


@gluon.jit
def allocate_scales():
    """Of a tile's tokens, and its tail's, for each consumer."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales_smem = gl.allocate_shared_memory(gl.float32, [2, 256], layout)
    return scales_smem, gl.allocate_shared_memory(gl.float32, [2, 32], layout)


@gluon.jit
def copy_row_scales(
    scales_smem, x_scale_ptr, stride_xsm, slots_ptr, first, rows, num_slots, topk, T: gl.constexpr
):
    """Scales of T tokens, from where their slots say."""
    t = gl.arange(0, T, layout=gl.BlockedLayout([1], [32], [4], [0]))
    slot = gl.load(slots_ptr + first + t, mask=t < rows, other=0)
    row = gl.where((slot >= 0) & (slot < num_slots), slot, 0) // topk
    copy_rows(scales_smem, x_scale_ptr + row.to(gl.int64) * stride_xsm, mask=t < rows)


@gluon.jit
def scaled(
    acc, w_scale, scales_smem, x_scale_ptr, stride_xsm, first, rows, T: gl.constexpr, GATHER: gl.constexpr
):
    """(64, T) sums times the scales of their weight rows and tokens."""
    layout: gl.constexpr = acc.type.layout
    if GATHER:
        x_scale = scales_smem.load(gl.SliceLayout(0, layout))
    else:
        t = gl.arange(0, T, layout=gl.SliceLayout(0, layout))
        x_scale = gl.load(x_scale_ptr + (first + t).to(gl.int64) * stride_xsm, mask=t < rows, other=0.0)
    w_scale = gl.convert_layout(w_scale, gl.SliceLayout(1, layout))
    return acc.to(gl.float32) * gl.expand_dims(w_scale, 1) * gl.expand_dims(x_scale, 0)
