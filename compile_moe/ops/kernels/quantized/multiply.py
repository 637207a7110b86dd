"""The product of one tile: weights dequantized in registers, scales where the scheme has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from compile_moe.ops.kernels.epilogue import build_epilogue, epilogue, with_globals
from compile_moe.ops.kernels.precision import accumulate
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat, decode, decode_scale


def load_scales(ptrs, group, num_groups, stride, GROUPS: tl.constexpr):
    """(n, GROUPS) in float32 from pointers (n,) to the first group; zeros behind the last group."""
    groups = group + tl.arange(0, GROUPS)
    offsets = groups.to(tl.int64) * stride
    return decode_scale(tl.load(ptrs[:, None] + offsets[None, :], mask=(groups < num_groups)[None, :], other=0))


@triton.jit
def load_zeros(ptrs, shift, group, num_groups, stride, GROUPS: tl.constexpr, PACKED_ZEROS: tl.constexpr):
    """(n, GROUPS) uint8, as :func:`load_scales`, the part of the element that begins at bit ``shift`` (n,)."""
    groups = group + tl.arange(0, GROUPS)
    offsets = groups.to(tl.int64) * stride
    zeros = tl.load(ptrs[:, None] + offsets[None, :], mask=(groups < num_groups)[None, :], other=0)
    if PACKED_ZEROS == 1:
        return zeros
    return ((zeros.to(tl.int32) >> shift[:, None]) & ((1 << (8 // PACKED_ZEROS)) - 1)).to(tl.uint8)


def dequantized(
    codes, scale, zeros, DTYPE: tl.constexpr, GROUPS: tl.constexpr, SCALED: tl.constexpr, HAS_ZERO: tl.constexpr
):
    """Weights (n, k) of DTYPE, from codes (n, k), scales and zero points (n, GROUPS)."""
    if GROUPS > 1:
        shape: tl.constexpr = codes.shape
        w = decode(tl.reshape(codes, (shape[0], GROUPS, shape[1] // GROUPS)))
        if HAS_ZERO:
            w -= decode(zeros)[:, :, None]
        if SCALED:
            w *= scale[:, :, None]
        return tl.reshape(w.to(DTYPE), (shape[0], shape[1]))
    w = decode(codes)
    if HAS_ZERO:
        # Exact: both are small integers.
        w -= decode(zeros)
    if SCALED:
        w *= scale
    return w.to(DTYPE)


def multiply(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    expert,
    column,  # (columns,), each inside the weights
    row,  # (rows,) of x, each inside it
    row_mask,
    depth,
    stride_xm,
    stride_xk,
    stride_xsm,
    stride_xsk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_se,
    stride_sn,
    stride_sk,
    stride_ze,
    stride_zn,
    stride_zk,
    SCALES_SUMS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PACKED: tl.constexpr,
    PACKED_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """``column``s of one expert's product with rows of x, scaled: (columns, rows), float32.

    A step multiplies BLOCK_K columns of x. Its scales are those of one group, or of several whole ones. Where neither
    BLOCK_K nor GROUP divides the other (not ALIGNED), every group starts a step, and what is left of its last is masked.
    """
    WIDTH: tl.constexpr = column.shape[0]
    BLOCK_M: tl.constexpr = row.shape[0]
    GROUPED: tl.constexpr = GROUP > 0
    GROUPS: tl.constexpr = BLOCK_K // GROUP if GROUPED and ALIGNED and BLOCK_K > GROUP else 1
    STEPS: tl.constexpr = 1 if ALIGNED else (GROUP + BLOCK_K - 1) // BLOCK_K  # of a group
    INTEGER: tl.constexpr = SCALES_SUMS and w_ptr.dtype.element_ty == tl.int8
    expert = expert.to(tl.int64)
    row = row.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    stored_k = tl.arange(0, BLOCK_K // PACKED)
    x_ptrs = x_ptr + row[:, None] * stride_xm + k[None, :] * stride_xk
    w_ptrs = w_ptr + expert * stride_we + column[:, None] * stride_wn + stored_k[None, :] * stride_wk
    scale_ptrs = scale_ptr + expert * stride_se + (column // ROWS).to(tl.int64) * stride_sn
    x_scale_ptrs = x_scale_ptr + row * stride_xsm
    zero_ptrs = zero_ptr + expert * stride_ze + (column // PACKED_ZEROS).to(tl.int64) * stride_zn
    zero_shift = column % PACKED_ZEROS * (8 // PACKED_ZEROS)
    num_groups = tl.cdiv(depth, GROUP) if GROUPED else 1
    num_steps = tl.cdiv(depth, BLOCK_K) if ALIGNED else num_groups * STEPS

    # What a step needs besides its tiles is loaded one step ahead.
    scale = load_scales(scale_ptrs, 0, num_groups, stride_sk, GROUPS)
    if SCALES_SUMS:
        x_scale = tl.load(x_scale_ptrs)
    if HAS_ZERO:
        zeros = load_zeros(zero_ptrs, zero_shift, 0, num_groups, stride_zk, GROUPS, PACKED_ZEROS)
    else:
        zeros = scale
    acc = tl.zeros((WIDTH, BLOCK_M), dtype=tl.int32 if INTEGER and not GROUPED else tl.float32)
    for step in range(0, num_steps):
        if ALIGNED:
            first_k = step * BLOCK_K
            end_k = depth
            next_group = (first_k + BLOCK_K) // GROUP if GROUPED else 0
        else:
            first_k = step // STEPS * GROUP + step % STEPS * BLOCK_K
            end_k = tl.minimum((step // STEPS + 1) * GROUP, depth)
            next_group = (step + 1) // STEPS
        x_offset = tl.cast(first_k, tl.int64) * stride_xk
        w_offset = tl.cast(first_k // PACKED, tl.int64) * stride_wk
        if EVEN_K:
            x = tl.load(x_ptrs + x_offset, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_ptrs + w_offset)
        else:
            x = tl.load(x_ptrs + x_offset, mask=row_mask[:, None] & (first_k + k < end_k)[None, :], other=0.0)
            stored_mask = (first_k + stored_k * PACKED < end_k)[None, :]
            w = tl.load(w_ptrs + w_offset, mask=stored_mask, other=0.0)
        this_scale, these_zeros = scale, zeros
        if GROUPED:
            scale = load_scales(scale_ptrs, next_group, num_groups, stride_sk, GROUPS)
            if HAS_ZERO:
                zeros = load_zeros(
                    zero_ptrs, zero_shift, next_group, num_groups, stride_zk, GROUPS, PACKED_ZEROS
                )
        if SCALES_SUMS:
            if INTEGER:
                product = tl.dot(w, tl.trans(x), out_dtype=tl.int32)
            else:
                # A product of its own: Hopper's tensor cores add up float8 products in few bits.
                product = tl.dot(w, tl.trans(x))
            if GROUPED:
                this_x_scale = x_scale
                x_scale = tl.load(
                    x_scale_ptrs + tl.cast(next_group, tl.int64) * stride_xsk, mask=next_group < num_groups, other=0.0
                )
                acc += product.to(tl.float32) * this_scale * this_x_scale[None, :]
            else:
                acc += product
        elif PACKED == 1:
            weights = dequantized(w, this_scale, these_zeros, x.dtype, GROUPS, GROUPED, HAS_ZERO)
            if not EVEN_K:
                weights = tl.where(stored_mask, weights, 0.0)
            acc = accumulate(weights, tl.trans(x), acc, PRECISION)
        else:
            # Weights of even and of odd columns lie in two tiles; so do the tokens then.
            even_x, odd_x = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
            even = dequantized(w & 15, this_scale, these_zeros, x.dtype, GROUPS, GROUPED, HAS_ZERO)
            odd = dequantized(w >> 4, this_scale, these_zeros, x.dtype, GROUPS, GROUPED, HAS_ZERO)
            if not EVEN_K:
                even = tl.where(stored_mask, even, 0.0)
                odd = tl.where(stored_mask, odd, 0.0)
            acc = accumulate(even, tl.trans(even_x), acc, PRECISION)
            acc = accumulate(odd, tl.trans(odd_x), acc, PRECISION)
    acc = acc.to(tl.float32)
    if not GROUPED:
        acc *= scale
        if SCALES_SUMS:
            acc *= x_scale[None, :]
    return acc


@functools.cache
def with_format(
    kernel: Callable[..., None],
    weight_format: WeightFormat,
    epilogue_body: str,
    do_not_specialize: tuple[str, ...],
) -> Any:
    """``kernel`` (undecorated, calls ``multiply`` and perhaps ``epilogue``) with a scheme's functions and an epilogue."""
    decoding = {
        "decode": weight_format.decode or decode,
        "decode_scale": weight_format.decode_scale,
    }
    parts = {f.__name__: triton.jit(with_globals(f, decoding)) for f in (dequantized, load_scales)}
    replaced = {
        "multiply": triton.jit(with_globals(multiply, parts)),
        "epilogue": build_epilogue(epilogue_body) if epilogue_body else epilogue,
    }
    return triton.jit(with_globals(kernel, replaced), do_not_specialize=list(do_not_specialize))
