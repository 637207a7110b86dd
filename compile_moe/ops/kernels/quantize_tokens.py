"""Quantize tokens with a scale for each token, or each group of its columns: one launch that reads them once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.token_rounding import bits_of_magnitude, quantized, row_strides, scale_of

#: Elements that a program holds; a share of more is read twice.
MOST_HELD = 8192
#: Programs along the rows, where only the GPU knows how many count.
MOST_PROGRAMS = 1024
#: Elements that a program takes at least, if shares are small.
FEW = 2048
#: Two loads of 16 bytes a thread, of 16-bit tokens.
_ELEMENTS_OF_WARP = 512


@triton.jit
def _quantize_row(
    quantized_ptr,
    scales_ptr,
    x_ptr,
    row,
    num_columns,
    width,
    num_shares,
    stride_xm,
    stride_xk,
    LARGEST: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """Some shares of one row."""
    row = tl.cast(row, tl.int64)
    share = tl.program_id(1) * SHARES + tl.arange(0, SHARES)
    lane = tl.arange(0, BLOCK)[None, :]
    column = (share * width)[:, None] + lane
    dtype: tl.constexpr = quantized_ptr.dtype.element_ty
    x_ptr += row * stride_xm
    quantized_ptr += row * num_columns
    if HELD:
        mask = (lane < width) & (column < num_columns)
        x = tl.load(x_ptr + column.to(tl.int64) * stride_xk, mask=mask, other=0.0)
        bits = tl.max(bits_of_magnitude(x), 1)
    else:
        largest = tl.zeros((SHARES, BLOCK), tl.int32)
        for first in range(0, width, BLOCK):
            here = column + first
            mask = (lane + first < width) & (here < num_columns)
            x = tl.load(x_ptr + here.to(tl.int64) * stride_xk, mask=mask, other=0.0)
            largest = tl.maximum(largest, bits_of_magnitude(x))
        bits = tl.max(largest, 1)
    scale = scale_of(bits, LARGEST)
    tl.store(scales_ptr + row * num_shares + share, scale, mask=share < num_shares)
    scale = scale[:, None]
    if HELD:
        tl.store(quantized_ptr + column, quantized(x, scale, dtype, LARGEST, BY_RECIPROCAL=True), mask=mask)
    else:
        for first in range(0, width, BLOCK):
            here = column + first
            mask = (lane + first < width) & (here < num_columns)
            x = tl.load(x_ptr + here.to(tl.int64) * stride_xk, mask=mask, other=0.0)
            tl.store(quantized_ptr + here, quantized(x, scale, dtype, LARGEST, BY_RECIPROCAL=True), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_tokens_kernel(
    quantized_ptr,  # (M, K), contiguous
    scales_ptr,  # (M, num_shares), contiguous
    x_ptr,  # (M, K)
    expert_offsets_ptr,  # (E + 1,), the last of which counts the rows
    num_rows,  # M
    num_experts,
    num_columns,  # K
    width,  # columns that share a scale
    num_shares,
    stride_xm,
    stride_xk,
    LARGEST: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,  # whether BLOCK holds a share
    HAS_OFFSETS: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_earlier_kernels(EARLY, STARTS_NEXT=False)
    if HAS_OFFSETS:
        num_rows = tl.minimum(tl.load(expert_offsets_ptr + num_experts), num_rows)
        for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
            _quantize_row(
                quantized_ptr, scales_ptr, x_ptr, row, num_columns, width, num_shares, stride_xm, stride_xk,
                LARGEST, SHARES, BLOCK, HELD,
            )  # fmt: skip
    else:
        _quantize_row(
            quantized_ptr, scales_ptr, x_ptr, tl.program_id(0), num_columns, width, num_shares, stride_xm, stride_xk,
            LARGEST, SHARES, BLOCK, HELD,
        )  # fmt: skip


def launch_for(
    quantized: Tensor,
    scales: Tensor,
    tokens: Tensor,
    expert_offsets: Tensor | None,
    width: int,
    largest: float,
) -> Launch:
    m, k = tokens.shape
    width = max(1, min(width, k))
    num_shares = scales.size(1)
    block = min(triton.next_power_of_2(width), MOST_HELD)
    shares = min(triton.next_power_of_2(max(1, num_shares)), max(1, FEW // block))
    options = {
        "LARGEST": largest,
        "SHARES": shares,
        "BLOCK": block,
        "HELD": width <= block,
        "HAS_OFFSETS": expert_offsets is not None,
        "num_warps": max(shares * block // _ELEMENTS_OF_WARP, 1),
        **early_launch(quantized.device),
    }
    num_experts = 0 if expert_offsets is None else expert_offsets.size(0) - 1
    offsets = scales if expert_offsets is None else expert_offsets
    args = (quantized, scales, tokens, offsets, m, num_experts, k, width, num_shares, *row_strides(tokens))
    programs = m if expert_offsets is None else min(m, MOST_PROGRAMS)
    return Launch(quantize_tokens_kernel, (programs, triton.cdiv(num_shares, shares)), args, options)


def quantize_tokens(
    quantized: Tensor,
    scales: Tensor,
    tokens: Tensor,
    expert_offsets: Tensor | None,
    width: int,
    largest: float,
) -> None:
    """Launch into quantized (M, K) and scales (M, ceil(K / width)), both contiguous, from tokens (M, K).

    Args:
        expert_offsets: (E + 1,), the last of which counts the rows; None: all count.
        largest: magnitude of quantized numbers.
    """
    launch(_plan, quantized, scales, tokens, expert_offsets, width, largest)


def _plan(*arguments: Any) -> Plan:
    only = launch_for(*arguments)
    constants = only.options["LARGEST"], only.options["HAS_OFFSETS"]
    key = ("quantize_tokens", constants, only.args[5:], *map(pointer_key, only.args[:4]))
    return Plan(key, (only,), lambda: (only,))
