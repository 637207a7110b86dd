"""Quantize tokens with one scale for all, or a given one each.

Without given scales one launch finds the largest magnitudes of parts, and every program of the next one takes the
largest of these: no atomics, and nothing to initialise.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.token_rounding import bits_of_magnitude, quantized, row_strides, scale_of

BLOCK = 2048
#: Parts of which maxima are found.
MOST_PARTS = 512
#: Programs, of all columns' blocks together; each of them needs the maxima.
MOST_PROGRAMS = 2048
#: Maxima that every program takes the largest of; of more, the maxima of parts are found first.
MOST_MAXIMA = 1024


def find_maxima(
    maxima_ptr,  # (programs of both axes,)
    x_ptr,  # (num_rows, num_columns)
    expert_offsets_ptr,  # (E + 1,), the last of which counts the rows
    num_rows,
    num_experts,
    num_columns,
    stride_xm,
    stride_xk,
    BLOCK: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
):
    """Program (i, j) takes rows i, i + programs of axis 0, … and of these the blocks j, j + programs of axis 1, …"""
    if HAS_OFFSETS:
        num_rows = tl.minimum(tl.load(expert_offsets_ptr + num_experts), num_rows)
    largest = tl.zeros((BLOCK,), tl.int32)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row_ptr = x_ptr + tl.cast(row, tl.int64) * stride_xm
        for first in range(tl.program_id(1) * BLOCK, num_columns, tl.num_programs(1) * BLOCK):
            column = first + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + column.to(tl.int64) * stride_xk, mask=column < num_columns, other=0.0)
            largest = tl.maximum(largest, bits_of_magnitude(x))
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(maxima_ptr + part, tl.max(largest, 0).to(tl.float32, bitcast=True))


maxima_of_tokens = triton.jit(find_maxima, do_not_specialize=["num_rows"])
#: Maxima are a row, whose length depends on the number of tokens.
maxima_of_maxima = triton.jit(find_maxima, do_not_specialize=["num_columns"])


@triton.jit
def _load_row(x_ptr, row, end_row, num_columns, stride_xm, stride_xk, BLOCK: tl.constexpr):
    """A block of columns of one row."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (column < num_columns) & (row < end_row)
    return tl.load(
        x_ptr + tl.cast(row, tl.int64) * stride_xm + column.to(tl.int64) * stride_xk, mask=mask, other=0.0
    )


@triton.jit
def _store_row(
    quantized_ptr,
    scales_ptr,
    given_ptr,
    x,
    row,
    end_row,
    scale,
    num_columns,
    stride_g,
    LARGEST: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.cast(row, tl.int64)
    if GIVEN == "scales":
        scale = tl.load(given_ptr + row * stride_g, mask=row < end_row)
        tl.store(scales_ptr + row, scale, mask=(tl.program_id(1) == 0) & (row < end_row))
    # Given scales are any numbers.
    y = quantized(x, scale, quantized_ptr.dtype.element_ty, LARGEST, BY_RECIPROCAL=GIVEN == "maxima")
    tl.store(quantized_ptr + row * num_columns + column, y, mask=(column < num_columns) & (row < end_row))


@triton.jit(do_not_specialize=["num_rows", "num_maxima"])
def quantize_per_tensor_kernel(
    quantized_ptr,  # (M, K), contiguous
    scales_ptr,  # (1,) or (M, 1), contiguous
    x_ptr,  # (M, K)
    given_ptr,  # maxima (num_maxima,), or scales (1,) or (M, 1)
    expert_offsets_ptr,  # (E + 1,), the last of which counts the rows
    num_rows,  # M
    num_maxima,
    num_experts,
    num_columns,  # K
    stride_xm,
    stride_xk,
    stride_g,
    LARGEST: tl.constexpr,
    GIVEN: tl.constexpr,  # "maxima", "scale" or "scales"
    MOST_MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
):
    end_row = num_rows
    if HAS_OFFSETS:
        end_row = tl.minimum(tl.load(expert_offsets_ptr + num_experts), num_rows)
    row = tl.program_id(0)
    # Before the scale, for which there is as much to wait.
    x = _load_row(x_ptr, row, end_row, num_columns, stride_xm, stride_xk, BLOCK)
    scale = 0.0
    if GIVEN != "scales":
        if GIVEN == "maxima":
            part = tl.arange(0, MOST_MAXIMA)
            maxima = tl.load(given_ptr + part * stride_g, mask=part < num_maxima, other=0.0)
            scale = scale_of(tl.max(bits_of_magnitude(maxima), 0), LARGEST)
        else:
            scale = tl.load(given_ptr)
        tl.store(scales_ptr, scale, mask=(tl.program_id(1) == 0) & (row == 0))
    for next_row in range(row + tl.num_programs(0), end_row, tl.num_programs(0)):
        next_x = _load_row(x_ptr, next_row, end_row, num_columns, stride_xm, stride_xk, BLOCK)
        _store_row(
            quantized_ptr, scales_ptr, given_ptr, x, row, end_row, scale, num_columns, stride_g, LARGEST, GIVEN, BLOCK
        )  # fmt: skip
        row, x = next_row, next_x
    _store_row(
        quantized_ptr, scales_ptr, given_ptr, x, row, end_row, scale, num_columns, stride_g, LARGEST, GIVEN, BLOCK
    )  # fmt: skip


def launch_for(
    quantized: Tensor,
    scales: Tensor,
    tokens: Tensor,
    given: Tensor,
    num_maxima: int | None,
    expert_offsets: Tensor | None,
    largest: float,
) -> Launch:
    """``given``: maxima of that number; or scales, if it is None."""
    m, k = tokens.shape
    each = num_maxima is None and given.dim() == 2
    block = min(triton.next_power_of_2(max(1, k)), BLOCK)
    options = {
        "LARGEST": largest,
        "GIVEN": "maxima" if num_maxima is not None else "scales" if each else "scale",
        "MOST_MAXIMA": MOST_MAXIMA,
        "BLOCK": block,
        "HAS_OFFSETS": expert_offsets is not None,
        "num_warps": 4,
    }
    stride_g = given.stride(0) if given.size(0) > 1 else 1
    offsets, num_experts = _bound(expert_offsets, given)
    sizes = (m, num_maxima or 0, num_experts, k)
    args = (quantized, scales, tokens, given, offsets, *sizes, *row_strides(tokens), stride_g)
    blocks = max(1, triton.cdiv(k, block))
    programs = min(m, max(1, MOST_PROGRAMS // blocks))
    # One scale is written even if there are no tokens.
    grid = (programs if each else max(1, programs), blocks)
    return Launch(quantize_per_tensor_kernel, grid, args, options)


def launch_of_maxima(parts: Tensor, tokens: Tensor, expert_offsets: Tensor | None) -> Launch:
    offsets, num_experts = _bound(expert_offsets, tokens)
    m, k = tokens.shape
    args = (parts, tokens, offsets, m, num_experts, k, *row_strides(tokens))
    options = {"BLOCK": BLOCK, "HAS_OFFSETS": expert_offsets is not None, "num_warps": 8}
    return Launch(maxima_of_tokens, _grid(tokens), args, options)


def launch_of_fewer(parts: Tensor, maxima: Tensor) -> Launch:
    number = maxima.size(0)
    args = (parts, maxima, maxima, 1, 0, number, 1, maxima.stride(0) if number > 1 else 1)
    options = {"BLOCK": BLOCK, "HAS_OFFSETS": False, "num_warps": 8}
    return Launch(maxima_of_maxima, _grid(maxima.unsqueeze(0)), args, options)


def _bound(expert_offsets: Tensor | None, otherwise: Tensor) -> tuple[Tensor, int]:
    """Where the number of rows that count lies, and at which element."""
    return (otherwise, 0) if expert_offsets is None else (expert_offsets, expert_offsets.size(0) - 1)


def _grid(rows: Tensor) -> tuple[int, int]:
    m, k = rows.shape
    blocks = max(1, triton.cdiv(k, BLOCK))
    return min(m, MOST_PARTS), min(blocks, MOST_PARTS // max(1, min(m, MOST_PARTS)))


def quantize_per_tensor(
    quantized: Tensor,
    scales: Tensor,
    tokens: Tensor,
    scale: Tensor | None,
    maxima: Tensor | None,
    expert_offsets: Tensor | None,
    largest: float,
) -> None:
    """Launch into quantized (M, K) and scales, both contiguous, from tokens (M, K).

    Args:
        scale: (1,) or (M, 1), or None to compute one for all.
        maxima: magnitudes, any number of them, the largest of which is the tokens'; or None to find them.
        expert_offsets: (E + 1,), the last of which counts the rows; None: all count.
        largest: magnitude of quantized numbers.
    """
    if scale is not None:
        launch(_plan_given, quantized, scales, tokens, scale, expert_offsets, largest)
        return
    found_in = tokens if maxima is None else maxima.unsqueeze(0)
    rows, blocks = _grid(found_in)
    parts = scales.new_empty(rows * blocks)
    launch(_plan, quantized, scales, tokens, maxima, parts, expert_offsets, largest)


def _plan_given(*arguments: Any) -> Plan:
    quantized, scales, tokens, scale, expert_offsets, largest = arguments
    only = launch_for(quantized, scales, tokens, scale, None, expert_offsets, largest)
    return Plan(_key(only), (only,), lambda: (only,))


def _plan(
    quantized: Tensor,
    scales: Tensor,
    tokens: Tensor,
    maxima: Tensor | None,
    parts: Tensor,
    expert_offsets: Tensor | None,
    largest: float,
) -> Plan:
    if maxima is None:
        before = launch_of_maxima(parts, tokens, expert_offsets)
    else:
        before = launch_of_fewer(parts, maxima)
    if maxima is None or maxima.size(0) > MOST_MAXIMA:
        last = launch_for(quantized, scales, tokens, parts, parts.size(0), expert_offsets, largest)
        launches: tuple[Launch, ...] = before, last
    else:
        last = launch_for(quantized, scales, tokens, maxima, maxima.size(0), None, largest)
        launches = (last,)
    key = (*_key(last), maxima is None, before.args[6:], *map(pointer_key, before.args[:3]))
    return Plan(key, launches, lambda: (before, last))


def _key(launch: Launch) -> tuple[Any, ...]:
    constants = tuple(launch.options[name] for name in ("LARGEST", "GIVEN", "HAS_OFFSETS"))
    return ("quantize_per_tensor", constants, launch.args[7:], *map(pointer_key, launch.args[:5]))
