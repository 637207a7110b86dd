"""Weighted sum over a token's rows of a batch; rows of no slot are never read."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key
from compile_moe.ops.kernels.tiles import row_stride

BLOCK = 1024


@triton.jit
def reduce_batch_kernel(
    out_ptr,  # (M, K), contiguous
    batch_ptr,  # (E, max_num_tokens, K)
    topk_weights_ptr,  # (M, topk)
    batch_rows_ptr,  # (M, topk)
    num_rows,  # E * max_num_tokens
    max_num_tokens,
    num_columns,  # K
    stride_be,
    stride_bi,
    stride_bk,
    stride_wm,
    stride_wj,
    stride_rm,
    stride_rj,
    TOPK: tl.constexpr,
    APPLY_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_earlier_kernels(EARLY)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOPK):
        row = tl.load(batch_rows_ptr + token * stride_rm + j * stride_rj)
        is_placed = (row >= 0) & (row < num_rows)
        row = tl.where(is_placed, row, 0).to(tl.int64)
        expert = row // max_num_tokens
        start = expert * stride_be + (row - expert * max_num_tokens) * stride_bi
        x = tl.load(batch_ptr + start + column.to(tl.int64) * stride_bk, mask=mask & is_placed, other=0.0)
        term = x.to(tl.float32)
        if APPLY_WEIGHTS:
            weight = tl.load(topk_weights_ptr + token * stride_wm + j * stride_wj, mask=is_placed, other=0.0)
            term = term * weight.to(tl.float32)
        acc += term
    tl.store(out_ptr + token * num_columns + column, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_for(
    out: Tensor, batch: Tensor, topk_weights: Tensor, batch_rows: Tensor, apply_weights: bool
) -> Launch:
    m, topk = batch_rows.shape
    num_experts, max_num_tokens, num_columns = batch.shape

    args = (
        out,
        batch,
        topk_weights,
        batch_rows,
        num_experts * max_num_tokens,
        max_num_tokens,
        num_columns,
        *batch.stride(),
        row_stride(topk_weights),
        topk_weights.stride(1),
        row_stride(batch_rows),
        batch_rows.stride(1),
    )
    options = {
        "TOPK": topk,
        "APPLY_WEIGHTS": apply_weights,
        "BLOCK": BLOCK,
        "num_warps": 4,
        **early_launch(out.device),
    }
    return Launch(reduce_batch_kernel, (m, triton.cdiv(num_columns, BLOCK)), args, options)


def reduce_batch(
    out: Tensor, batch: Tensor, topk_weights: Tensor, batch_rows: Tensor, apply_weights: bool
) -> None:
    """Launch into out (M, K), contiguous."""
    launch(_plan, out, batch, topk_weights, batch_rows, apply_weights)


def _plan(*arguments: Any) -> Plan:
    only = launch_for(*arguments)
    constants = only.options["TOPK"], only.options["APPLY_WEIGHTS"]
    key = ("reduce_batch", constants, only.args[4:], *map(pointer_key, only.args[:4]))
    return Plan(key, (only,), lambda: (only,))
