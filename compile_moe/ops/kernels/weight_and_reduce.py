"""Weighted sum over a token's experts; skipped slots are never read."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compile_moe.ops.kernels.early_launch import await_earlier_kernels, early_launch
from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key

BLOCK = 1024


@triton.jit
def weight_and_reduce_kernel(
    out_ptr,  # (M, K), contiguous
    x_ptr,  # (M, topk, K)
    topk_weights_ptr,  # (M, topk)
    topk_ids_ptr,  # (M, topk)
    expert_map_ptr,  # (num_global,)
    num_columns,  # K
    stride_xm,
    stride_xj,
    stride_xk,
    stride_wm,
    stride_wj,
    stride_im,
    stride_ij,
    num_global,
    num_experts,
    TOPK: tl.constexpr,
    APPLY_WEIGHTS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_earlier_kernels(EARLY)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOPK):
        valid = True
        if HAS_IDS:
            expert = tl.load(topk_ids_ptr + token * stride_im + j * stride_ij)
            valid = (expert >= 0) & (expert < num_global)
            if HAS_MAP:
                expert = tl.load(expert_map_ptr + tl.where(valid, expert, 0), mask=valid, other=-1)
                valid = valid & (expert >= 0) & (expert < num_experts)
        x = tl.load(
            x_ptr + token * stride_xm + tl.cast(stride_xj, tl.int64) * j + column.to(tl.int64) * stride_xk,
            mask=mask & valid,
            other=0.0,
        )
        term = x.to(tl.float32)
        if APPLY_WEIGHTS:
            weight = tl.load(topk_weights_ptr + token * stride_wm + j * stride_wj, mask=valid, other=0.0)
            term = term * weight.to(tl.float32)
        acc += term
    tl.store(out_ptr + token * num_columns + column, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_for(
    out: Tensor,
    fused_out: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor | None,
    expert_map: Tensor | None,
    num_experts: int,
    apply_weights: bool,
) -> Launch:
    m, topk, num_columns = fused_out.shape

    # The stride of a dimension of size 1 means nothing, but would select another specialization.
    def row_stride(t: Tensor, otherwise: int) -> int:
        return t.stride(0) if m > 1 else otherwise

    ids = topk_weights if topk_ids is None else topk_ids
    args = (
        out,
        fused_out,
        topk_weights,
        ids,
        ids if expert_map is None else expert_map,
        num_columns,
        row_stride(fused_out, topk * num_columns),
        *fused_out.stride()[1:],
        row_stride(topk_weights, topk),
        topk_weights.stride(1),
        row_stride(ids, topk),
        ids.stride(1),
        num_experts if expert_map is None else expert_map.size(0),
        num_experts,
    )
    options = {
        "TOPK": topk,
        "APPLY_WEIGHTS": apply_weights,
        "HAS_IDS": topk_ids is not None,
        "HAS_MAP": expert_map is not None,
        "BLOCK": BLOCK,
        "num_warps": 4,
        **early_launch(out.device),
    }
    return Launch(weight_and_reduce_kernel, (m, triton.cdiv(num_columns, BLOCK)), args, options)


def weight_and_reduce(
    out: Tensor,
    fused_out: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor | None,
    expert_map: Tensor | None,
    num_experts: int,
    apply_weights: bool,
) -> None:
    """Launch into out (M, K), contiguous."""
    expert_map = None if expert_map is None else expert_map.contiguous()
    launch(_plan, out, fused_out, topk_weights, topk_ids, expert_map, num_experts, apply_weights)


def _plan(*arguments: Any) -> Plan:
    only = launch_for(*arguments)
    constants = tuple(only.options[name] for name in ("TOPK", "APPLY_WEIGHTS", "HAS_IDS", "HAS_MAP"))
    key = ("weight_and_reduce", constants, only.args[5:], *map(pointer_key, only.args[:5]))
    return Plan(key, (only,), lambda: (only,))
