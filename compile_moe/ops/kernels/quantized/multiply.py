"""The product of one tile: weights dequantized in registers, scales where the scheme has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from compile_moe.ops.kernels.epilogue import build_epilogue, epilogue, with_globals
from compile_moe.ops.kernels.precision import accumulate
from compile_moe.ops.kernels.quantized.arithmetic import difference, times
from compile_moe.ops.kernels.quantized.weight_format import (
    WeightFormat,
    decode,
    decode_16_bits,
    decode_scale,
)


@triton.jit
def load_groups(ptrs, group, num_groups, stride, GROUPS: tl.constexpr):
    """(n, GROUPS) from pointers (n,) to what belongs to the first group; zeros behind the last group."""
    if GROUPS == 1:
        return tl.load(ptrs[:, None] + tl.cast(group, tl.int64) * stride)
    else:
        groups = group + tl.arange(0, GROUPS)
        offsets = groups.to(tl.int64) * stride
        return tl.load(ptrs[:, None] + offsets[None, :], mask=(groups < num_groups)[None, :], other=0)


def dequantized(
    codes,
    scale,
    zero,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Weights (n, k) of DTYPE, rounded once, from codes (n, k), scales and decoded zero points (n, GROUPS)."""
    if GROUPS > 1:
        shape: tl.constexpr = codes.shape
        w = decode(tl.reshape(codes, (shape[0], GROUPS, shape[1] // GROUPS)))
        if HAS_ZERO:
            w -= zero[:, :, None]
        if SCALED:
            w *= scale[:, :, None]
        return tl.reshape(w.to(DTYPE), (shape[0], shape[1]))
    else:
        w = decode(codes)
        if HAS_ZERO:
            # Exact: both are small integers.
            w -= zero
        if SCALED:
            w *= scale
        return w.to(DTYPE)


@triton.jit
def dequantized_in_16_bits(
    w,
    scale,
    zero,
    GROUPS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Weights (n, k) from decoded ones: like :func:`dequantized`, rounded once."""
    shape: tl.constexpr = w.shape
    if GROUPS > 1:
        w = tl.reshape(w, (shape[0], GROUPS, shape[1] // GROUPS))
        scale = scale[:, :, None]
        if HAS_ZERO:
            zero = zero[:, :, None]
    if HAS_ZERO:
        # Exact: both are small integers.
        w = difference(w, zero.to(w.dtype))
    if SCALED:
        w = times(w, scale.to(w.dtype))
    return tl.reshape(w, (shape[0], shape[1])) if GROUPS > 1 else w


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
    IN_16_BITS: tl.constexpr,
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
    BLOCK_K nor GROUP divides the other (not ALIGNED), every group starts a step, and what its last one lacks is masked.
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
    zero_shift = (column % PACKED_ZEROS * (8 // PACKED_ZEROS))[:, None]
    num_groups = tl.cdiv(depth, GROUP) if GROUPED else 1
    num_steps = tl.cdiv(depth, BLOCK_K) if ALIGNED else num_groups * STEPS

    acc = tl.zeros((WIDTH, BLOCK_M), dtype=tl.int32 if INTEGER and not GROUPED else tl.float32)
    for step in range(0, num_steps):
        if ALIGNED:
            first_k = step * BLOCK_K
            end_k = depth
            group = first_k // GROUP if GROUPED else 0
        else:
            first_k = step // STEPS * GROUP + step % STEPS * BLOCK_K
            end_k = tl.minimum((step // STEPS + 1) * GROUP, depth)
            group = step // STEPS
        x_offset = tl.cast(first_k, tl.int64) * stride_xk
        w_offset = tl.cast(first_k // PACKED, tl.int64) * stride_wk
        if EVEN_K:
            x = tl.load(x_ptrs + x_offset, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_ptrs + w_offset)
        else:
            x = tl.load(x_ptrs + x_offset, mask=row_mask[:, None] & (first_k + k < end_k)[None, :], other=0.0)
            stored_mask = (first_k + stored_k * PACKED < end_k)[None, :]
            w = tl.load(w_ptrs + w_offset, mask=stored_mask, other=0.0)
        scale = None
        zero = None
        if GROUPED:
            # Read where they are used: values that a loop carries would keep Triton from dequantizing in the layout
            # that the tensor cores want.
            scale = decode_scale(load_groups(scale_ptrs, group, num_groups, stride_sk, GROUPS))
        if HAS_ZERO:
            zero = load_groups(zero_ptrs, group, num_groups, stride_zk, GROUPS)
            if PACKED_ZEROS > 1:
                zero = (zero.to(tl.int32) >> zero_shift) & ((1 << (8 // PACKED_ZEROS)) - 1)
            zero = decode(zero)
        if SCALES_SUMS:
            if INTEGER:
                product = tl.dot(w, tl.trans(x), out_dtype=tl.int32)
            else:
                # A product of its own: Hopper's tensor cores add up float8 products in few bits.
                product = tl.dot(w, tl.trans(x))
            if GROUPED:
                x_scale = tl.load(x_scale_ptrs + tl.cast(group, tl.int64) * stride_xsk)
                acc += product.to(tl.float32) * scale * x_scale[None, :]
            else:
                acc += product
        elif PACKED == 1:
            if IN_16_BITS:
                weights = decode_16_bits(w, x.dtype)
                weights = dequantized_in_16_bits(weights, scale, zero, GROUPS, GROUPED, HAS_ZERO)
            else:
                weights = dequantized(w, scale, zero, x.dtype, GROUPS, GROUPED, HAS_ZERO)
            if not EVEN_K:
                weights = tl.where(stored_mask, weights, 0.0)
            # A product of its own: adding it up, Triton 3.6 would overwrite the registers that hold weights, and the
            # tokens, while Hopper's tensor cores still read them. An fma, because Triton makes a sum of an addition.
            product = accumulate(weights, tl.trans(x), tl.zeros_like(acc), PRECISION)
            acc = tl.fma(product, tl.full(acc.shape, 1.0, tl.float32), acc)
        else:
            # Weights of even and of odd columns lie in two tiles; so do the tokens then. Triton awaits both products.
            even_x, odd_x = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
            if IN_16_BITS:
                even, odd = decode_16_bits(w, x.dtype)
                even = dequantized_in_16_bits(even, scale, zero, GROUPS, GROUPED, HAS_ZERO)
                odd = dequantized_in_16_bits(odd, scale, zero, GROUPS, GROUPED, HAS_ZERO)
            else:
                even = dequantized(w & 15, scale, zero, x.dtype, GROUPS, GROUPED, HAS_ZERO)
                odd = dequantized(w >> 4, scale, zero, x.dtype, GROUPS, GROUPED, HAS_ZERO)
            if not EVEN_K:
                even = tl.where(stored_mask, even, 0.0)
                odd = tl.where(stored_mask, odd, 0.0)
            acc = accumulate(even, tl.trans(even_x), acc, PRECISION)
            acc = accumulate(odd, tl.trans(odd_x), acc, PRECISION)
    acc = acc.to(tl.float32)
    if not GROUPED:
        acc *= decode_scale(tl.load(scale_ptrs))[:, None]
        if SCALES_SUMS:
            acc *= tl.load(x_scale_ptrs)[None, :]
    return acc


@functools.cache
def with_format(
    kernel: Callable[..., None],
    weight_format: WeightFormat,
    epilogue_body: str,
    do_not_specialize: tuple[str, ...],
) -> Any:
    """``kernel``, undecorated, whose ``multiply`` has the functions of a scheme, and with an epilogue."""
    decoding = {
        "decode": weight_format.decode or decode,
        "decode_16_bits": weight_format.decode_16_bits or decode_16_bits,
        "decode_scale": weight_format.decode_scale,
    }
    decoding["dequantized"] = triton.jit(with_globals(dequantized, decoding))
    replaced = {
        "multiply": triton.jit(with_globals(multiply, decoding)),
        "epilogue": build_epilogue(epilogue_body) if epilogue_body else epilogue,
    }
    return triton.jit(with_globals(kernel, replaced), do_not_specialize=list(do_not_specialize))
